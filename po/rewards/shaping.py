"""Rewards made from other rewards and the group: computed after those, in this process, from numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from annotated_types import Ge, Gt

from po.rewards.cells import Call, Cell, Failure, failed
from po.rewards.group import anchor_ranking, baseline_mean, contrast_mask, correct_length
from po.rewards.verifiers import column, tokens


@dataclass(frozen=True)
class Seen:
    """What the other rewards said, by name; the groups are lists of indices."""

    call: Call
    parts: Mapping[str, Sequence[Cell]]
    groups: Sequence[Sequence[int]]


class Shaping(Protocol):
    """A reward that reads rewards."""

    @property
    def of(self) -> Mapping[str, str]:
        """The names of the rewards it reads, by option."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of the row that it reads."""
        ...

    def __call__(self, seen: Seen) -> tuple[list[Cell], Counter[str]]:
        """A cell for each completion, and what was counted."""
        ...


def _single(seen: Seen, reward: Callable[[int], float | None]) -> list[Cell]:
    out: list[Cell] = []
    for i in range(len(seen.call)):
        try:
            out.append(reward(i))
        except (KeyError, TypeError, ValueError) as e:
            out.append(failed(e))
    return out


def _lacking(seen: Seen, i: int, names: Sequence[str]) -> Cell:
    """Why a completion cannot be shaped: a reward that failed, or (None) one that does not apply."""
    broken = [n for n in names if isinstance(seen.parts[n][i], Failure)]
    return Failure("raised", f"the reward {broken[0]!r} that it reads failed") if broken else None


def _complete(seen: Seen, names: Sequence[str]) -> tuple[list[Cell], list[list[int]], list[list[float]]]:
    """Cells of what cannot be shaped; groups of the rest; the numbers of each name."""
    numbers: list[list[float]] = [[0.0] * len(seen.call) for _ in names]
    out: list[Cell] = [_lacking(seen, i, names) for i in range(len(seen.call))]
    groups = []
    for group in seen.groups:
        members = []
        for i in group:
            said = [seen.parts[n][i] for n in names]
            if all(isinstance(s, float) for s in said):
                members.append(i)
                for k, s in enumerate(said):
                    assert isinstance(s, float)
                    numbers[k][i] = s
        groups.append(members)
    return out, groups, numbers


@dataclass(frozen=True, kw_only=True)
class GroupContrast:
    """GeometryZero: +1, 0 or -1 for a completion that shows the behaviour, by whether it helps in its group."""

    accuracy: str  # the reward that says how right a completion is
    behaviour: str  # the reward that is above 0 where the behaviour occurs, e.g. a `format` of weight 0
    epsilon: Annotated[float, Ge(0)] = 0.1  # the mean accuracies must differ by more
    reads = ()

    @property
    def of(self) -> Mapping[str, str]:
        """Both are needed."""
        return {"accuracy": self.accuracy, "behaviour": self.behaviour}

    def __call__(self, seen: Seen) -> tuple[list[Cell], Counter[str]]:
        """The mask times whether the behaviour is there."""
        out, groups, (accuracy, behaviour) = _complete(seen, [self.accuracy, self.behaviour])
        for group in groups:
            mask = contrast_mask([accuracy[i] for i in group], [behaviour[i] > 0 for i in group], self.epsilon)
            for i in group:
                out[i] = float(mask) if behaviour[i] > 0 else 0.0
        return out, Counter()


@dataclass(frozen=True, kw_only=True)
class CorrectLength:
    """GeometryZero: scale x min(tokens / target, 1) where another reward is above 0, else 0."""

    accuracy: str  # the reward that says whether the answer is right
    target: Annotated[int, Ge(1)]
    scale: Annotated[float, Gt(0)] = 1.0
    reads = ()

    @property
    def of(self) -> Mapping[str, str]:
        """The accuracy."""
        return {"accuracy": self.accuracy}

    def __call__(self, seen: Seen) -> tuple[list[Cell], Counter[str]]:
        """Completion by completion."""

        def reward(i: int) -> float:
            ids = seen.call.completion_ids
            length = len(tokens(None if ids is None else ids[i]))
            return correct_length(length, numbers[0][i] > 0, self.target, self.scale)

        out, groups, numbers = _complete(seen, [self.accuracy])
        sound = {i for group in groups for i in group}
        given = _single(seen, lambda i: reward(i) if i in sound else None)
        return [new if i in sound else old for i, (old, new) in enumerate(zip(out, given))], Counter()


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Minus the mean of the row's baseline rewards. Give it the weight of the reward that they are of."""

    column: str = "baseline_rewards"

    @property
    def of(self) -> Mapping[str, str]:
        """It reads no other reward."""
        return {}

    @property
    def reads(self) -> tuple[str, ...]:
        """The baselines."""
        return (self.column,)

    def __call__(self, seen: Seen) -> tuple[list[Cell], Counter[str]]:
        """Row by row; null means that it does not apply."""

        def reward(i: int) -> float | None:
            said = column({k: v[i] for k, v in seen.call.columns.items()}, self.column)
            return None if said is None else -baseline_mean([float(b) for b in said])

        return _single(seen, reward), Counter()


@dataclass(frozen=True, kw_only=True)
class AnchorRank:
    """PU-RL: ranks within the group, 0 to 1, of the mean of two rewards: a judge's verdict in both orders."""

    first: str  # the reward P(the completion is better than the anchor), with the completion shown first
    second: str  # the same with it shown second
    reads = ()

    @property
    def of(self) -> Mapping[str, str]:
        """Both orders."""
        return {"first": self.first, "second": self.second}

    def __call__(self, seen: Seen) -> tuple[list[Cell], Counter[str]]:
        """Completions whose two orders disagree are counted."""
        out, groups, (first, second) = _complete(seen, [self.first, self.second])
        counts: Counter[str] = Counter()
        for group in groups:
            rewards, alike = anchor_ranking([first[i] for i in group], [second[i] for i in group])
            counts["orders_disagree"] += alike.count(False)
            for i, reward in zip(group, rewards):
                out[i] = reward
        return out, counts

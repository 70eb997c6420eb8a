"""Pairs from sets: one input row to the rows of its pairs. po.prep.pairing has the rules."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from po.data.read import Record
from po.prep.pairing import NAMES, Balance, Pair, Policy, Rules, balance, lot, number_of, pairs, policy_of
from po.prep.rows import ScoredSet, pair_of, read_set
from po.prep.specs import corrupt, in_format
from po.prep.step import Outcome
from po.spec import Source

Form = Literal["pair", "responses"]


@dataclass(frozen=True)
class MakePairs:
    """The work of pair.py. own: the sources that count as the policy's own; unmixed: no pair of one of these and
    one of others; balance: what share() found."""

    source: Source
    rules: Rules
    form: Form = "pair"
    own: frozenset[str] = frozenset()
    unmixed: bool = False
    balance: Balance | None = None

    def __call__(self, record: Record) -> Outcome:
        """A row per pair; of a row that is a pair already, itself."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        found, refused, sums = self.found(read)
        rows = tuple(self._row(read, pair) for pair in found if self._passes(read, pair))
        left = len(found) - len(rows)
        if left:
            sums = {**sums, "pairs left out: on/off-policy share": left}
            refused = "on/off-policy share"
        if not rows:
            return Outcome(dropped=refused or "no pair", sums=sums)
        return Outcome(rows, sums={**sums, **self._kinds(read, found)})

    def found(self, read: ScoredSet) -> tuple[tuple[Pair, ...], str | None, dict[str, float]]:
        """The pairs of a row that its own rules let through, why there is none, and how many fell to which rule."""
        rewards = read.rewards
        if read.row.is_pair:
            return self._given(read, rewards)
        if rewards is None:
            return (), "no reward or label on every answer", {}
        made = pairs(rewards, read.texts, str(read.row.prompt), self.rules, lambda p: self._allowed(read, p))
        return made.pairs, made.refused, {f"pairs left out: {NAMES[k]}": n for k, n in made.why.items()}

    def _allowed(self, read: ScoredSet, pair: Pair) -> bool:
        return not self.unmixed or self.policy(read, pair) != "mixed"

    def _given(
        self, read: ScoredSet, rewards: list[float] | None
    ) -> tuple[tuple[Pair, ...], str | None, dict[str, float]]:
        """A pair by the data's own word stays, where its rewards pass the window."""
        r = self.rules
        free = Rules(rule=r.rule, seed=r.seed, per_prompt=r.per_prompt)
        if r == free:
            return self._stays(read)
        if rewards is None:
            return (), "a pair without rewards, which the rules need", {}
        gap, middle = rewards[0] - rewards[1], (rewards[0] - rewards[1]) / 2
        if middle * middle > r.most_variance:
            return (), "variance of the rewards", {}
        if not r.least_margin <= gap <= r.most_margin:
            return (), NAMES["margin"], {}
        if rewards[0] < r.least_chosen:
            return (), NAMES["chosen"], {}
        return self._stays(read)

    def _stays(self, read: ScoredSet) -> tuple[tuple[Pair, ...], str | None, dict[str, float]]:
        if not self._allowed(read, (0, 1)):
            return (), NAMES["policy"], {}
        return ((0, 1),), None, {"pairs as given": 1}

    def policy(self, read: ScoredSet, pair: Pair) -> Policy:
        """By who wrote the two answers."""
        return policy_of(read.sources, pair, self.own)

    def drawn(self, read: ScoredSet, pair: Pair) -> int:
        """The lot by which a pair stays or goes."""
        texts = read.texts
        return number_of(lot(self.rules.seed, "balance", str(read.row.prompt), texts[pair[0]], texts[pair[1]]))

    def _passes(self, read: ScoredSet, pair: Pair) -> bool:
        return self.balance is None or self.balance.keeps(self.policy(read, pair), self.drawn(read, pair))

    def _kinds(self, read: ScoredSet, found: Iterable[Pair]) -> dict[str, float]:
        kinds = [self.policy(read, pair) for pair in found if self._passes(read, pair)] if self.own else []
        return {f"pairs {kind}-policy": kinds.count(kind) for kind in ("on", "off", "mixed") if kind in kinds}

    def _row(self, read: ScoredSet, pair: Pair) -> dict[str, Any]:
        a, b = pair
        more: dict[str, Any] = {} if read.row.is_pair else {"id": f"{read.row.id}/{a}-{b}"}
        if self.own:
            more["policy"] = self.policy(read, pair)
        if self.form == "pair":
            return read.as_pair(a, b, **more)
        return read.with_answers([read.answers[a], read.answers[b]], **more)


def share(records: Iterable[Record], work: MakePairs, on_policy: float) -> Balance:
    """Read everything once, to know up to which lot pairs of either kind can stay. 8 bytes of memory a pair."""
    lots: dict[str, array[int]] = {"on": array("Q"), "off": array("Q"), "mixed": array("Q")}
    for record in records:
        read = read_set(record, work.source) if record.data is not None else ()
        if isinstance(read, ScoredSet):
            for pair in work.found(read)[0]:
                lots[work.policy(read, pair)].append(work.drawn(read, pair))
    return balance(lots["on"], lots["off"], on_policy)


@dataclass(frozen=True)
class BreakFormat:
    """SPECS: the best right answer in its format over the same text with the format broken."""

    source: Source
    tags: tuple[str, ...]
    right: float  # an answer is right whose reward (or label, 1 or -1) is at least this
    seed: int = 0

    def __call__(self, record: Record) -> Outcome:
        """At most one pair a row."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        rewards = read.rewards
        if rewards is None:
            return Outcome(dropped="no reward or label on every answer")
        fine = [k for k, r in enumerate(rewards) if r >= self.right]
        if not fine:
            return Outcome(dropped="no right answer")
        texts = {k: _text(read.row.responses[k].content) for k in fine}
        formed = [k for k in fine if in_format(texts[k], self.tags)]
        if not formed:
            return Outcome(dropped="no right answer in the format")
        best = max(formed, key=lambda k: rewards[k])
        way, broken = corrupt(texts[best], self.tags, lot(self.seed, str(read.row.prompt), texts[best]))
        content: Any = broken if isinstance(read.row.responses[best].content, str) else [_turn(broken)]
        better = {k: v for k, v in read.answers[best].items() if k in ("content", "source")}
        more = {"id": f"{read.row.id}/{best}-format", "corruption": way}
        return Outcome((pair_of(read.fields, better, {"content": content}, **more),), sums={f"corrupted: {way}": 1})


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _text(content: Any) -> str:
    """The text of an answer that is text or one message; of others nothing that could be in a format."""
    if isinstance(content, str):
        return content
    one = content[0].get("content") if len(content) == 1 else None
    return one if isinstance(one, str) else ""

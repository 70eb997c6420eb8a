"""A sampled group as a row of the journal, and back as the Example that heads see."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from po.data.rows import Example
from po.rollout.journal import Line

Source = Literal["policy", "reference", "gold", "own"]
_OURS = ("round", "place", "prompt", "prompt_ids", "tokenizer", "responses")


@dataclass(frozen=True)
class Answer:
    """A response of a group: sampled from the policy or the reference, or the row's own."""

    ids: tuple[int, ...]
    text: str
    source: Source
    ended: bool = True
    logps: tuple[float, ...] | None = None  # the sampler's
    reward: float | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict)  # each reward by name
    problems: tuple[str, ...] = ()  # why a reward that was asked for is not there
    label: int | None = None  # 0: unlabelled; None: not settled yet

    def to_json(self) -> dict[str, Any]:
        """As a response of a row."""
        out: dict[str, Any] = {
            "content": self.text,
            "token_ids": list(self.ids),
            "logps": None if self.logps is None else list(self.logps),
            "ended": self.ended,
            "source": self.source,
            "reward": self.reward,
            "rewards": dict(self.parts),
            "label": self.label or None,  # null: unlabelled
        }
        return out | ({"problems": list(self.problems)} if self.problems else {})

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Answer:
        """What `to_json` gave."""
        return Answer(
            tuple(said["token_ids"]),
            said["content"],
            said["source"],
            said["ended"],
            None if said["logps"] is None else tuple(said["logps"]),
            said["reward"],
            said["rewards"],
            tuple(said.get("problems", ())),
            said["label"] or 0,
        )


@dataclass(frozen=True)
class Written:
    """A prompt and its answers."""

    round: int
    place: int
    example: int  # index of the prompt
    answers: tuple[Answer, ...]

    def to_json(self, prompt: Example, tokenizer: str) -> Line:
        """A row: what was sampled, and the fields of the row that the prompt came from."""
        record = json.loads(prompt.record or "{}")
        return {
            "id": f"{prompt.id}/{self.round}.{self.place}",
            "round": self.round,
            "place": self.place,
            "example": self.example,
            "prompt": record.get("prompt"),
            "prompt_ids": list(prompt.prompt_ids),
            "tokenizer": tokenizer,
            "responses": [a.to_json() for a in self.answers],
            "row": {k: v for k, v in record.items() if k not in _OURS},
        }

    @staticmethod
    def from_json(line: Line) -> Written:
        """What `to_json` gave."""
        return Written(
            line["round"], line["place"], line["example"], tuple(Answer.from_json(a) for a in line["responses"])
        )

    @property
    def sound(self) -> tuple[Answer, ...]:
        """The answers that rewards did not fail on."""
        return tuple(a for a in self.answers if not a.problems)

    @property
    def flat(self) -> bool:
        """Whether all rewards are equal, so that comparing the answers says nothing."""
        return len({a.reward for a in self.sound}) < 2


def consistency(answers: Sequence[Answer], first: str, second: str) -> float:
    """(1 + Kendall's tau) / 2 of how two rewards rank the answers (CREAM, Wang et al. 2024, arXiv:2410.12735); a pair
    that either ranks as equal counts as neither. NaN where one of them is missing."""
    ranks = [(a.parts.get(first), a.parts.get(second)) for a in answers]
    agree = total = 0
    for (a, b), (c, d) in combinations(ranks, 2):
        if a is None or b is None or c is None or d is None:
            return math.nan
        agree += (a > c) * (b > d) + (a < c) * (b < d) - (a > c) * (b < d) - (a < c) * (b > d)
        total += 1
    return (1 + agree / max(total, 1)) / 2


def as_example(
    prompt: Example, answers: Sequence[Answer], columns: Sequence[str], agree: tuple[str, str] | None = None
) -> Example:
    """What heads see of a group. columns: the response columns that they read. Log-probs that the sampler did not give
    (the row's own responses) are NaN. Answers without a reward, beside such as have one, are in fillers alone. agree:
    two rewards whose consistency becomes the row's."""
    rewarded = any(a.reward is not None or a.problems for a in answers)
    own = {name: tuple(_column(a, name) for a in answers) for name in columns}
    return replace(
        prompt,
        response_ids=tuple(a.ids for a in answers),
        reward=tuple(a.reward or 0.0 for a in answers) if rewarded else None,
        label=tuple(a.label or 0 for a in answers),
        logps=tuple(a.logps or (math.nan,) * len(a.ids) for a in answers),
        response_columns=tuple(own.items()),
        columns=(*prompt.columns, *((("consistency", consistency(answers, *agree)),) if agree else ())),
        chosen_first=False,
        record=None,
        ended=tuple(a.ended for a in answers),
    )


def _column(answer: Answer, name: str) -> float:
    """A number of one answer: where it is from, or what one of the rewards gave."""
    known: Mapping[str, Callable[[Answer], float]] = {
        "gold": lambda a: float(a.source == "gold"),
        "from_reference": lambda a: float(a.source == "reference"),
    }
    if name in known:
        return known[name](answer)
    value = answer.parts.get(name)
    return math.nan if value is None else value

"""Answers that a model revises: CLAIR's minimal revisions, BMC's worse answer brought up to the better one.

D'Oosterlinck et al. 2024, arXiv:2408.06266; Jiang et al. 2024, arXiv:2408.07471. The chosen answer is what a stronger
model makes of a given one, which is rejected; so the two differ in little but what is better. The requests are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from po.data.read import Record
from po.prep.asking import Left, Rounds, as_text, complete, plain, say, settled, written
from po.prep.contrast import Sampling, after, contrast, one_text
from po.prep.distance import edited, jaccard
from po.prep.prompts import Prompt
from po.prep.rows import ScoredSet, read_set
from po.prep.texts import normal
from po.spec import Source

_DONE = "revised|corrected|improved|rewritten|edited|refined"
_MENTION = re.compile(
    rf"\b(?:(?:{_DONE}) (?:answer|response|solution|version|reply|draft)|"
    rf"(?:original|previous) (?:answer|response|reply)|the learner|"
    rf"student's (?:answer|solution|work)|answer (?-i:[AB])\b|I(?:'ve| have)? (?:{_DONE})|this revision)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Revise:
    """clair: the worst answer, and its revision over it. bmc: the worse of two, edited towards the better, over it.

    model: its name, as the source of what it writes. least_jaccard: what shares fewer words with the answer that it
    revises is a new answer.
    """

    source: Source
    kind: Literal["clair", "bmc"]
    prompt: Prompt
    model: str
    sampling: Sampling = field(default_factory=Sampling)
    least_jaccard: float = 0.2

    def __call__(self, record: Record) -> Rounds:
        """One request, at most one row."""
        return settled(read_set(record, self.source), self._rounds)

    def _rounds(self, read: ScoredSet, counts: Counter[str]) -> Rounds:
        better, worse = (None, worst(read)) if self.kind == "clair" else both(read)
        task, old = as_text(read.row), one_text(read, worse)
        best = None if better is None else one_text(read, better)
        values = {"answer": old} if best is None else {"better": best, "worse": old}
        asked = self.prompt.fill(task=task, **values)
        (answer,) = yield from complete([self.sampling.ask(say(asked), self.kind)])
        new = fitted(after(self.prompt.marker, answer.replies[0]), old)
        measured = self._measured(new, old, best, task)
        reward = read.row.responses[worse].reward
        for name, value in measured.items():
            counts[f"mean {name}"] = value  # type: ignore[assignment]
        chosen = {"content": written(read.row, new), "source": self.model}
        rejected = plain(read.answers[worse], **({"source": s} if (s := read.sources[worse]) else {}))
        known = {} if reward is None else {"rejected_reward": reward}
        return [contrast(read, self.kind, chosen, rejected, [self.prompt], **measured, **known)]

    def _measured(self, new: str, old: str, best: str | None, task: str) -> dict[str, float]:
        """How far the new text is from those it was made of. Left where it will not do."""
        if normal(new) == normal(old):
            raise Left("the revision is the answer")
        if best is not None and normal(new) == normal(best):
            raise Left("the revision is the better answer")
        there = " ".join((task, old, best or "")).lower()
        if any(found[0].lower() not in there for found in _MENTION.finditer(new)):
            raise Left("speaks of a revision")
        shared = jaccard(old, new)
        if shared < self.least_jaccard:
            raise Left("a new answer, no revision")
        measured = {"jaccard": shared, "levenshtein": edited(old, new)}
        if best is not None:
            measured["levenshtein_to_better"] = edited(best, new)
        return {name: round(value, 6) for name, value in measured.items()}


def worst(read: ScoredSet) -> int:
    """The answer to revise: a pair's rejected, a set's (first) lowest reward, a lone one."""
    if read.row.is_pair or len(read.answers) == 1:
        return len(read.answers) - 1
    rewards = _rewards(read)
    return rewards.index(min(rewards))


def both(read: ScoredSet) -> tuple[int, int]:
    """The better and the worse answer of a pair; of a set the best and the worst."""
    if read.row.is_pair:
        return 0, 1
    rewards = _rewards(read)
    if min(rewards) == max(rewards):
        raise Left("equal rewards")
    return rewards.index(max(rewards)), rewards.index(min(rewards))


def _rewards(read: ScoredSet) -> list[float]:
    if read.rewards is None:
        raise Left("no reward or label on every answer")
    return read.rewards


def fitted(new: str, old: str) -> str:
    """A text between the white space that stands around another: what the answer to a plain text needs before it."""
    return old[: len(old) - len(old.lstrip())] + new.strip() + old[len(old.rstrip()) :]

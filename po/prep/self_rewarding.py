"""Self-rewarding: a model judges its own answers, and CREAM asks how far the model before it ranks them alike.

Yuan et al. 2024, Self-Rewarding Language Models, arXiv:2401.10020; Wang et al. 2024, CREAM, arXiv:2410.12735.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from po.data.read import Record
from po.prep.agreement import kendall_tau
from po.prep.asking import Left, Rounds, answered, as_text, read_answers, said, say, settled
from po.prep.chat import Answer, Ask
from po.prep.contrast import Sampling, contrast
from po.prep.pairing import Rules, pairs
from po.prep.prompts import Prompt
from po.prep.rows import ScoredSet
from po.prep.search_prompts import POINTS
from po.prep.second import Second
from po.prep.verdicts import mean_points
from po.spec import Source

_OF_TOKENS = ("token_ids", "logps", "embedding", "teacher")
Agreement = Literal["kendall", "top"]


def agreement(now: Sequence[float], before: Sequence[float], how: Agreement = "kendall") -> float:
    """CREAM's C: (1 + Kendall's tau) / 2, or whether both rankings have the same first and the same last (1 or 0)."""
    if how == "kendall":
        return (1 + kendall_tau(now, before)) / 2
    ends = [(r.index(max(r)), r.index(min(r))) for r in (list(now), list(before))]
    return float(ends[0] == ends[1])


@dataclass(frozen=True)
class Said:
    """Scores that the responses carry: one field, or the difference of two (DPO's reward: logps less ref_logps).

    A name with a point looks into an object (`scores.judge`); a list of numbers is summed.
    """

    names: tuple[str, ...]

    def of(self, answer: Mapping[str, Any]) -> float | None:
        """None where a field is missing or no finite number."""
        found = [_number(answer, name) for name in self.names]
        if any(x is None for x in found):
            return None
        first, *rest = (x for x in found if x is not None)
        return first - math.fsum(rest)


def _number(answer: Mapping[str, Any], name: str) -> float | None:
    value: Any = answer
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return None
    whole = math.fsum(values)
    return whole if math.isfinite(whole) else None


@dataclass(frozen=True)
class SelfRewarding:
    """The work of one row: a set of answers, of which the best is paired with the worst.

    now: what ranks them; None: the model's points. before: the ranking that CREAM compares it with; None: the points of
    the second model; "nothing": no comparison. constant: written as the consistency of every row.
    """

    source: Source
    now: Said | None = None
    before: Said | Literal["nothing"] | None = "nothing"
    how: Agreement = "kendall"
    constant: float | None = None
    verdicts: int = 3
    sampling: Sampling = field(default_factory=Sampling)
    points: Prompt = POINTS

    def __call__(self, record: Record) -> Rounds:
        """Rounds of requests, and at their end the Outcome."""
        return settled(read_answers(record, self.source), self._rows)

    def _rows(self, read: ScoredSet, counts: Counter[str]) -> Generator[list[Ask], list[Answer], list[dict[str, Any]]]:
        now, before = yield from self._scores(read, counts)
        known = [k for k, (a, b) in enumerate(zip(now, before, strict=True)) if a is not None and b is not None]
        counts["answers without a score"] += len(now) - len(known)
        ours, theirs = [now[k] or 0.0 for k in known], [before[k] or 0.0 for k in known]
        found = pairs(ours, [read.texts[k] for k in known], "", Rules())
        if not found.pairs:
            raise Left(str(found.refused))
        best, worst = (known[i] for i in found.pairs[0])
        more: dict[str, Any] = {}
        if self.before != "nothing":
            c = agreement(ours, theirs, self.how)
            counts["mean consistency"] += c  # type: ignore[assignment]
            counts["pairs that CREAM turns over (consistency below 1/2)"] += c < 0.5
            more = {"consistency": c} if self.constant is None else {"own_consistency": c}
        if self.constant is not None:
            more["consistency"] = self.constant
        bare = [{k: v for k, v in a.items() if k not in _OF_TOKENS} for a in read.answers]
        better, worse = ({**bare[i], "reward": now[i]} for i in (best, worst))
        prompts = [self.points] if self.now is None or self.before is None else []
        made = contrast(read, "self_rewarding", better, worse, prompts)
        return [{**made, **more, "id": f"{read.row.id}/{best}-{worst}"}]

    def _scores(
        self, read: ScoredSet, counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], tuple[list[float | None], list[float | None]]]:
        """Of every answer, this model's score and the earlier one's; the same twice where there is no earlier one."""
        kinds = [kind for kind, said_ in ((Ask, self.now), (Second, self.before)) if said_ is None]
        texts = [said(a["content"]) for a in read.answers] if kinds else []
        task = as_text(read.row) if kinds else ""
        asks = [
            self.sampling.ask(say(self.points.fill(task=task, answer=text)), kind=kind, n=self.verdicts)
            for kind in kinds
            for text in texts
            if text is not None
        ]
        verdicts = iter((yield from answered(asks)))
        judged: dict[type[Ask], list[float | None]] = {}
        for kind in kinds:
            judged[kind] = [None if t is None else _mean(next(verdicts), counts) for t in texts]
        now = judged[Ask] if self.now is None else [self.now.of(a) for a in read.answers]
        if self.before == "nothing":
            return now, now
        return now, judged[Second] if self.before is None else [self.before.of(a) for a in read.answers]


def _mean(texts: Sequence[str], counts: Counter[str]) -> float | None:
    mean, unread = mean_points(texts)
    counts["verdicts"] += len(texts)
    counts["verdicts not readable"] += unread
    return mean

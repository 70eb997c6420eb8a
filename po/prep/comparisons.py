"""Rows whose answers were compared with each other, some missing, some wrong: completed and mended, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from po.data.formats import LABELS, RANKS, REWARDS, SET
from po.data.read import Record
from po.data.report import Problem, describe
from po.prep.agreement import kendall_tau
from po.prep.curatron import CLIP, Completed, Floats, Method, borda, complete, observed_logits
from po.prep.rows import read_set
from po.prep.step import Outcome
from po.spec import Source

_COMPARISON = "{a, b, p}: p of response a being better than b, 0 to 1; or {a, b, wins, of}"


@dataclass(frozen=True)
class Complete:
    """CURATRON's problem, per row: `comparisons` between its responses, some missing, some wrong."""

    source: Source
    method: Method = "low_rank"
    clip: float = CLIP
    tolerance: float = 1.0

    def __call__(self, record: Record) -> Outcome:
        """All comparisons, each with what it `was`, and a reward for each response: the mean of its mended logits."""
        assert record.data is not None
        read = read_set(_with_rewards(record), self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        n = len(read.answers)
        table_NN = table(record.where, record.data.get("comparisons"), n)
        if isinstance(table_NN, Problem):
            return Outcome(problem=table_NN)
        try:
            done = complete(table_NN, self.method, self.clip, self.tolerance)
        except ValueError as e:
            return Outcome(dropped=str(e))
        before = borda(*observed_logits(table_NN, self.clip))
        listed = [_entry(done, a, b) for a in range(n) for b in range(a + 1, n)]
        answers = [{**one, "reward": float(s)} for one, s in zip(read.answers, done.score_N)]
        tau = kendall_tau(before.tolist(), done.score_N.tolist())
        was = [one["was"] for one in listed]
        sums = {f"comparisons {name}": float(was.count(name)) for name in ("kept", "moved", "flipped", "filled")}
        return Outcome((read.with_answers(answers, comparisons=listed, rank_agreement=tau),), sums=sums)


def _with_rewards(record: Record) -> Record:
    """Rows that are compared need no rewards; what they are given here is replaced."""
    data = record.data or {}
    answers: list[Any] = next((data[k] for k in SET if isinstance(data.get(k), list)), [])
    told = [data, *(a for a in answers if isinstance(a, dict))]
    if any(one.get(k) is not None for one in told for k in (*REWARDS, *RANKS, *LABELS)):
        return record
    return Record(record.where, {**data, "rewards": [0.0] * len(answers)}) if answers else record


def _entry(done: Completed, a: int, b: int) -> dict[str, Any]:
    was = "flipped" if done.flipped_NN[a, b] else "moved" if done.corrupted_NN[a, b] else "kept"
    return {"a": a, "b": b, "p": float(done.probability_NN[a, b]), "was": "filled" if done.filled_NN[a, b] else was}


def table(where: str, comparisons: object, n: int) -> Floats | Problem:
    """The comparisons as probabilities, NaN where there are none. Several of a pair are averaged; of counts, half a win
    is added to either side."""
    if not isinstance(comparisons, list | tuple) or not comparisons:
        return Problem(where, "comparisons", f"a list of {_COMPARISON}", describe(comparisons))
    sum_NN, count_NN = np.zeros((n, n)), np.zeros((n, n))
    for k, one in enumerate(comparisons):
        read = _probability(one, n)
        if read is None:
            return Problem(where, f"comparisons[{k}]", _COMPARISON + f"; a and b below {n}", describe(one))
        a, b, p, weight = read
        sum_NN[a, b], count_NN[a, b] = sum_NN[a, b] + p * weight, count_NN[a, b] + weight
        sum_NN[b, a], count_NN[b, a] = sum_NN[b, a] + (1 - p) * weight, count_NN[b, a] + weight
    return np.where(count_NN > 0, sum_NN / np.maximum(count_NN, 1), np.nan)


def _probability(one: object, n: int) -> tuple[int, int, float, float] | None:
    """a, b, p and how many comparisons that stands for."""
    if not isinstance(one, Mapping):
        return None
    a, b, p, wins, of = (one.get(k) for k in ("a", "b", "p", "wins", "of"))
    if type(a) is not int or type(b) is not int or a == b or not (0 <= a < n and 0 <= b < n):
        return None
    if p is None and _number(wins) and _number(of) and 0 <= wins <= of and of > 0:  # type: ignore[operator]
        return a, b, (wins + 0.5) / (of + 1), float(of)  # type: ignore[operator, arg-type]
    if _number(p) and 0 <= p <= 1:  # type: ignore[operator]
        return a, b, float(p), 1.0  # type: ignore[arg-type]
    return None


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

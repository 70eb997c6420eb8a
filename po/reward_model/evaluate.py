"""How well a reward model tells pairs apart: accuracy, by strength, and whether its probabilities can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

BUCKETS = 5  # of equal size, by strength
BINS = 10  # of equal width, by confidence


@dataclass(frozen=True)
class Judged:
    """What the model says of one pair."""

    chosen: float
    rejected: float
    preferred: float  # P(the chosen answer is better)
    loss: float

    @property
    def margin(self) -> float:
        """r(chosen) - r(rejected)."""
        return self.chosen - self.rejected

    @property
    def right(self) -> float:
        """1 where the chosen answer scores higher, 1/2 where they tie."""
        return 1.0 if self.margin > 0 else 0.5 if self.margin == 0 else 0.0


@dataclass(frozen=True)
class Bucket:
    """Pairs of neighbouring strength."""

    low: float
    high: float
    pairs: int
    accuracy: float
    margin: float


@dataclass(frozen=True)
class Bin:
    """Pairs of neighbouring confidence, the larger of P(chosen is better) and P(rejected is better)."""

    low: float
    high: float
    pairs: int
    said: float  # mean confidence
    observed: float  # share that was right


@dataclass(frozen=True)
class Evaluation:
    """All of it. ece: the mean gap between confidence and share, weighted by pairs."""

    pairs: int
    accuracy: float
    standard_error: float  # of the accuracy
    margin: float
    loss: float
    scores: Mapping[str, float]
    strength: str  # what the buckets are made by
    buckets: tuple[Bucket, ...]
    bins: tuple[Bin, ...]
    ece: float

    def to_json(self) -> dict[str, Any]:
        """For reward_report.json."""
        return asdict(self)


def summary(judged: Sequence[Judged]) -> dict[str, float]:
    """The figures of a log line, under the names of preference training."""
    return {
        "loss": fmean(j.loss for j in judged),
        "rewards/accuracies": fmean(j.right for j in judged),
        "rewards/margins": fmean(j.margin for j in judged),
        "rewards/chosen": fmean(j.chosen for j in judged),
        "rewards/rejected": fmean(j.rejected for j in judged),
    }


def evaluate(judged: Sequence[Judged], strengths: Sequence[float | None]) -> Evaluation:
    """strengths: the rows' own, in the same order; buckets are by the model's |margin| unless every pair has one."""
    known = [s for s in strengths if s is not None]
    given = len(known) == len(judged)
    by = known if given else [abs(j.margin) for j in judged]
    scores = [r for j in judged for r in (j.chosen, j.rejected)]
    mean = fmean(scores)
    accuracy = fmean(j.right for j in judged)
    bins = calibration(judged)
    return Evaluation(
        pairs=len(judged),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(judged)),
        margin=fmean(j.margin for j in judged),
        loss=fmean(j.loss for j in judged),
        scores={
            "mean": mean,
            "std": math.sqrt(fmean((r - mean) ** 2 for r in scores)),
            "min": min(scores),
            "max": max(scores),
        },
        strength="the rows' strength" if given else "the model's own |margin|",
        buckets=by_strength(judged, by),
        bins=bins,
        ece=sum(b.pairs * abs(b.said - b.observed) for b in bins) / len(judged),
    )


def by_strength(judged: Sequence[Judged], strengths: Sequence[float], buckets: int = BUCKETS) -> tuple[Bucket, ...]:
    """Buckets of equal size (the last pairs spread over the first buckets), the weakest first."""
    order = sorted(range(len(judged)), key=lambda i: strengths[i])
    size, more = divmod(len(order), buckets)
    found, start = [], 0
    for k in range(buckets):
        part = order[start : start + size + (k < more)]
        start += len(part)
        if part:
            some = [judged[i] for i in part]
            ends = strengths[part[0]], strengths[part[-1]]
            found.append(Bucket(*ends, len(part), fmean(j.right for j in some), fmean(j.margin for j in some)))
    return tuple(found)


def calibration(judged: Sequence[Judged], bins: int = BINS) -> tuple[Bin, ...]:
    """Confidence from 1/2 to 1 in bins of equal width; empty ones are left out. Which answer is called chosen says
    nothing of the model, so a pair counts by the side that the model prefers."""
    found = []
    for k in range(bins):
        low, high = 0.5 + 0.5 * k / bins, 0.5 + 0.5 * (k + 1) / bins
        some = [j for j in judged if min(int((_confidence(j) - 0.5) * 2 * bins), bins - 1) == k]
        if some:
            said, right = fmean(map(_confidence, some)), fmean(j.right for j in some)
            found.append(Bin(low, high, len(some), said, right))
    return tuple(found)


def _confidence(j: Judged) -> float:
    return max(j.preferred, 1 - j.preferred)

"""Several scorers' numbers for the answers of one row to one number each, by a named rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median, pstdev
from typing import Literal

from po.errors import UserError
from po.rewards.group import rank_normalised

Merging = Literal["weighted", "mean", "min", "max", "median", "zscore", "rank", "first"]


def merge(rule: Merging, scores: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """scores[scorer][answer], nothing missing -> a reward for each answer. weights: for `weighted` alone.

    weighted: the sum of weight x score, as rollouts add rewards. zscore, rank: each scorer's numbers are first put on a
    common scale within the row (standard scores; ranks from 0 to 1), then averaged.
    """
    match rule:
        case "weighted":
            return [math.fsum(w * s for w, s in zip(weights, of, strict=True)) for of in zip(*scores, strict=True)]
        case "zscore":
            scores = [standard(one) for one in scores]
        case "rank":
            scores = [rank_normalised(one) for one in scores]
        case "first":
            return list(scores[0])
    how: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "max": max, "median": median}
    return [float(how.get(rule, fmean)(of)) for of in zip(*scores, strict=True)]


def standard(scores: Sequence[float]) -> list[float]:
    """(score - mean) / standard deviation (population) over the row; all 0 where the scores are equal."""
    mean, std = fmean(scores), pstdev(scores)
    return [(s - mean) / std if std > 0 else 0.0 for s in scores]


def check_weights(rule: Merging, weights: Sequence[tuple[str, float]]) -> None:
    """Raises UserError for a weight by place that the rule would not read. 0 is read by all: scored, not merged."""
    for place, weight in weights:
        if rule != "weighted" and weight not in (0, 1):
            raise UserError(
                f"{place}.weight: --merge {rule} reads no weights but 0 and 1; leave it out, or merge by weighted"
            )

"""Repairing preference labels by the strength that an ensemble of reward models gives them (Secrets of RLHF, part II).

Wang et al. 2024, Secrets of RLHF in Large Language Models Part II: Reward Modeling, arXiv:2401.06080. Of M reward
models' margins d_m = r_m(chosen) - r_m(rejected) a pair has strength mean(d_m) and spread std(d_m, of the population).
The margins must be out-of-fold: a model that was trained on a pair remembers its label, right or wrong.

Unverified: the shares, which the paper gives as what it saw (the lowest 20 % hurt, up to 40 % say nothing, the highest
10 % are learnt by heart); sigmoid(strength) as the soft label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Way = Literal["flip", "soft", "drop", "smooth", "keep"]


@dataclass(frozen=True)
class Strength:
    """What an ensemble says about a pair."""

    mean: float
    std: float

    @classmethod
    def of(cls, margins: Sequence[float]) -> Strength:
        """Of at least one model's margins."""
        mean = math.fsum(margins) / len(margins)
        return cls(mean, math.sqrt(math.fsum((d - mean) ** 2 for d in margins) / len(margins)))


@dataclass(frozen=True)
class Bands:
    """What becomes of a pair by its strength. A pair is below a band's threshold where its strength is less.

    low: below it `lowest` is done (flip, soft, drop, keep); middle: below it `unsure` (soft, drop, keep); high: from it
    on `highest` (smooth, keep). `thresholds` makes low, middle and high from shares of all pairs.
    """

    low: float = 0.0
    middle: float = 0.0
    high: float = math.inf
    lowest: Literal["flip", "soft", "drop", "keep"] = "flip"
    unsure: Literal["soft", "drop", "keep"] = "keep"
    highest: Literal["smooth", "keep"] = "keep"

    def way(self, strength: float) -> Way:
        """What to do with a pair. One whose ensemble agrees with its label is never flipped."""
        if strength < self.low:
            return "keep" if self.lowest == "flip" and strength >= 0 else self.lowest
        if strength < self.middle:
            return self.unsure
        return self.highest if strength >= self.high else "keep"


def thresholds(strengths: Sequence[float], low: float, middle: float, high: float) -> tuple[float, float, float]:
    """The strengths below which the shares `low` and `middle` of the pairs lie, and from which on the share `high`."""
    order = sorted(strengths)

    def at(share: float) -> float:
        place = round(share * len(order))
        return order[place] if place < len(order) else math.inf

    return at(low), at(max(low, middle)), at(1 - high)


def soft_label(strength: float) -> float:
    """P(the chosen answer is better) = sigmoid(strength)."""
    return 1 / (1 + math.exp(-strength)) if strength >= 0 else math.exp(strength) / (1 + math.exp(strength))


@dataclass(frozen=True)
class Mended:
    """What a pair becomes; None: it is dropped."""

    flipped: bool
    preference: float  # P(the answer that is now chosen is better): 1 for a hard label
    margin: float  # the strength in favour of the answer that is now chosen, for a loss with a margin


def mend(strength: float, way: Way, smoothing: float = 0.1) -> Mended | None:
    """A pair after `way`. A soft label below 1/2 turns the pair over, so that its preference is at least 1/2."""
    if way == "drop":
        return None
    preference = {"soft": soft_label(strength), "smooth": 1 - smoothing}.get(way, 1.0)
    if way == "flip" or preference < 0.5:
        return Mended(True, 1.0 if way == "flip" else 1 - preference, -strength)
    return Mended(False, preference, strength)

"""Labels for answers that have none, by a threshold that a few pairs teach (SSPO).

Lee et al. 2025, Semi-Supervised Preference Optimization with Limited Feedback, arXiv:2511.00040. An answer's score is
what the head `sspo` calls r(y), or any reward; above the threshold it is desirable, below not. The head itself follows
a moving threshold while it trains; here the labels are made once. `kde` and `min` are the head's thresholds, with its
Unverified points; `prior` is P(desirable).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from po.heads.sspo import SSPO

SAMPLED = 2048  # scores per side that the smoothed distributions are made of
Kind = Literal["kde", "min"]


@dataclass
class Scores:
    """Scores of answers whose labels are known: at most SAMPLED of each side, drawn by their lots, and the extremes."""

    won: list[tuple[bytes, float]] = field(default_factory=list)
    lost: list[tuple[bytes, float]] = field(default_factory=list)
    lowest_won: float = math.inf

    def add(self, score: float, desirable: bool, lot: bytes) -> None:
        """One answer."""
        side = self.won if desirable else self.lost
        side.append((lot, score))
        if desirable:
            self.lowest_won = min(self.lowest_won, score)
        if len(side) >= 2 * SAMPLED:
            side.sort()
            del side[SAMPLED:]

    def threshold(self, kind: Kind, prior: float = 0.5, bandwidth: float = 1.0) -> float:
        """Where the head would put it. ValueError where a side is empty."""
        if not self.won or not self.lost:
            raise ValueError("no desirable and undesirable answers with scores to learn the threshold from")
        if kind == "min":
            return self.lowest_won
        sides = [[score for _, score in sorted(side)[:SAMPLED]] for side in (self.won, self.lost)]
        score_1K = torch.tensor([sides[0] + sides[1]], dtype=torch.float64)
        won_1K = torch.arange(score_1K.shape[1])[None] < len(sides[0])
        return float(SSPO(prior=prior, bandwidth=bandwidth).least_risk(score_1K, won_1K, ~won_1K))


def labels(scores: Sequence[float], threshold: float, band: float = 0.0) -> list[bool | None]:
    """True above the threshold, False below or on it; None (unlabelled) nearer to it than `band`."""
    return [None if abs(s - threshold) < band else s > threshold for s in scores]


def unlabelled_loss(score: float, threshold: float, prior: float = 0.5) -> float:
    """The head's loss of an unlabelled answer with weigh_prior: P or 1 - P times -log sigmoid(|score - threshold|)."""
    gap = score - threshold
    return (prior if gap > 0 else 1 - prior) * math.log1p(math.exp(-abs(gap)))

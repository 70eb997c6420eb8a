"""How unsure a preference is, so that labels are bought (or rows trained on) where they say most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Literal

Measure = Literal["margin", "entropy", "spread", "disagreement"]


def margin(rewards: Sequence[float]) -> float:
    """Minus the difference of the best two rewards: 0 is the least sure."""
    best = heapq.nlargest(2, rewards)
    return best[1] - best[0]


def entropy(rewards: Sequence[float], scale: float = 1.0) -> float:
    """In nats, of softmax(scale x reward) over the answers; of two answers that of Bradley-Terry's preference."""
    top = max(rewards)
    weights = [math.exp(scale * (r - top)) for r in rewards]
    total = math.fsum(weights)
    return -math.fsum(w / total * math.log(w / total) for w in weights if w > 0)


def spread(scores: Sequence[Sequence[float]]) -> float:
    """Scorers' rewards of the same answers -> the standard deviation (population) of their margins between the two
    answers that their mean ranks first and second."""
    best, second = _leaders(scores)
    gaps = [one[best] - one[second] for one in scores]
    mean = math.fsum(gaps) / len(gaps)
    return math.sqrt(math.fsum((g - mean) ** 2 for g in gaps) / len(gaps))


def disagreement(scores: Sequence[Sequence[float]]) -> float:
    """The share of scorers that do not rank the mean's first answer above its second; a tie counts half."""
    best, second = _leaders(scores)
    return sum(0.5 if one[best] == one[second] else one[best] < one[second] for one in scores) / len(scores)


def _leaders(scores: Sequence[Sequence[float]]) -> tuple[int, int]:
    """Places of the highest two means; the first among equals."""
    mean = [math.fsum(of) / len(scores) for of in zip(*scores, strict=True)]
    order = sorted(range(len(mean)), key=lambda k: -mean[k])
    return order[0], order[1]


class Most:
    """The so many most uncertain rows of a stream, in memory no more than these. Equal ones: by their lot."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._heap: list[tuple[float, bytes]] = []
        self.seen = 0

    def add(self, uncertainty: float, lot: bytes) -> None:
        """One row."""
        self.seen += 1
        push = heapq.heappush if len(self._heap) < self.budget else heapq.heappushpop
        push(self._heap, (uncertainty, lot[:8]))

    @property
    def least(self) -> tuple[float, bytes]:
        """A row is among them where its (uncertainty, lot[:8]) is at least this."""
        return self._heap[0] if len(self._heap) == self.budget else (-math.inf, b"")

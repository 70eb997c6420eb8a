"""How well a repair did: against planted faults, whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Found:
    """Faults that were planted, faults that a repair named, and those that are both."""

    planted: int
    named: int
    both: int

    @classmethod
    def of(cls, planted: Sequence[bool], named: Sequence[bool]) -> Found:
        """Place by place."""
        both = sum(bool(p) and bool(n) for p, n in zip(planted, named, strict=True))
        return cls(sum(map(bool, planted)), sum(map(bool, named)), both)

    @property
    def precision(self) -> float:
        """Of what was named, the share that was planted; 1 where nothing was named."""
        return self.both / self.named if self.named else 1.0

    @property
    def recall(self) -> float:
        """Of what was planted, the share that was named; 1 where nothing was planted."""
        return self.both / self.planted if self.planted else 1.0


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """(concordant - discordant) / all pairs; a pair that either ranks as equal counts as neither."""
    found = [_sign(x - y) * _sign(u - v) for (x, u), (y, v) in combinations(zip(a, b, strict=True), 2)]
    return sum(found) / len(found) if found else 1.0


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)

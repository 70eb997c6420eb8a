"""Means with 95 % intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % points of Student's t, by degrees of freedom; 1.96 from 30 on is within 4 %.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its 95 % interval (nan where there is nothing to take one from)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, digits: int = 3) -> str:
        tail = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{tail}"


def interval(values: Sequence[float], single: float = math.nan) -> Interval:
    """Mean and t interval over seeds. single: the standard error that one value alone has, if known."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, 1.96 * single)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, (_T95[n - 2] if n - 2 < len(_T95) else 1.96) * spread / math.sqrt(n))


def verdict(difference: Interval, least: float = 0.0) -> str:
    """Whether a difference that a claim says is larger than `least` is so, by its whole interval."""
    if difference.low > least:
        return "holds"
    return "does not hold: the opposite" if difference.high < least else "does not hold: no difference beyond chance"

"""What a judge said, read strictly: a verdict that is not in the form that was asked for is none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_DRESS = r"[\s*_`#>\"'\[\]()]*"  # what a judge may put around a marked line


def form(mark: str, value: str) -> re.Pattern[str]:
    """A line `MARK: VALUE`, whatever its case and dress; value: a regular expression with its own groups."""
    return re.compile(rf"^{_DRESS}{mark}{_DRESS}:{_DRESS}{value}{_DRESS}\.?{_DRESS}$", re.IGNORECASE)


_VERDICT, _POINTS = form("verdict", "(yes|no)"), form("score", r"([0-5])(?:\s*/\s*5)?")


def last_line(pattern: re.Pattern[str], text: str) -> re.Match[str] | str:
    """What the last line says, where the form stands there and nowhere else; otherwise why that is no verdict."""
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(pattern.match(line) is not None for line in lines) > 1:
        return "several verdicts"
    return (pattern.match(lines[-1]) if lines else None) or "no verdict on the last line"


def _only(pattern: re.Pattern[str], text: str) -> tuple[str, str] | None:
    """What the last line says, and what stands before it; None where it says nothing."""
    found = last_line(pattern, text)
    return None if isinstance(found, str) else (found[1], "\n".join(text.strip().splitlines()[:-1]).strip())


def points(text: str) -> int | None:
    """0 to 5 from a last line `Score: 4`."""
    found = _only(_POINTS, text)
    return None if found is None else int(found[0])


def mean_points(texts: Sequence[str]) -> tuple[float | None, int]:
    """The mean of the verdicts that can be read, and how many cannot."""
    read = [p for p in map(points, texts) if p is not None]
    return (math.fsum(read) / len(read) if read else None), len(texts) - len(read)


@dataclass(frozen=True)
class Vote:
    """Verdicts of one answer, `Verdict: yes` or `no` on the last line. critique: what the first no is explained by."""

    yes: int
    no: int
    unread: int
    critique: str | None

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vote:
        """Verdict by verdict; one that cannot be read has no vote."""
        read = [v for v in (_only(_VERDICT, t) for t in texts) if v is not None]
        against = [why for said, why in read if said.lower() == "no"]
        critique = next((why for why in against if why), None)
        return cls(len(read) - len(against), len(against), len(texts) - len(read), critique)

    @property
    def value(self) -> float | None:
        """The share of yes; None where nothing could be read."""
        return self.yes / (self.yes + self.no) if self.yes + self.no else None


def p_yes(top: Sequence[Mapping[str, float]] | None) -> float | None:
    """P(yes) among yes and no at the first place, over their spellings; None where neither is among the likeliest."""
    if not top:
        return None
    mass = {"yes": 0.0, "no": 0.0}
    for token, logp in top[0].items():
        word = token.strip(" \t\n\"'*.,▁Ġ").lower()
        if word in mass:
            mass[word] += math.exp(logp)
    whole = mass["yes"] + mass["no"]
    return mass["yes"] / whole if whole > 0 else None

"""What became of every row that was read: counts that add up, and listings by file and line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LISTED = 500  # lines kept per listing
SHOWN = 20  # lines printed per listing
DROPPED = ("overlong", "identical", "empty")
TITLES = {
    "bad": "bad rows",
    "overlong": "rows dropped as too long",
    "identical": "rows dropped because their responses became identical",
    "empty": "rows dropped because a response has no tokens",
    "cut": "rows that lost tokens or responses",
    "boundary": "rows whose prompt tail is scored with the response (its tokens merge, or the template rewrites it)",
    "apart": "prompts whose own responses do not continue their tokens (the responses are left out)",
    "gap": "pairs whose chosen response has the lower score",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row. `str()` is the line the user reads."""

    where: str  # file:line
    field: str  # e.g. responses[2].reward; "" where it concerns the whole row
    expected: str
    got: str

    def __str__(self) -> str:
        return ": ".join(x for x in (self.where, self.field, f"expected {self.expected}, got {self.got}") if x)


@dataclass
class Faults:
    """Collects every problem of one row."""

    where: str
    found: list[Problem] = field(default_factory=list)

    def add(self, field: str, expected: str, got: object) -> None:
        """Note a problem. `got` is the value found, or a Say."""
        self.found.append(Problem(self.where, field, expected, describe(got)))


class Say(str):
    """Words for `got` that are printed as they are."""

    __slots__ = ()


NOTHING = Say("nothing")


def describe(value: object) -> str:
    """A value from the data in a few words, by the names JSON gives its types."""
    match value:
        case Say():
            return str(value)
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("infinity" if value > 0 else "-infinity")
        case str():
            return repr(value) if len(value) <= 40 else repr(value[:37] + "...")
        case list() | tuple():
            return "an empty list" if not value else f"a list of {len(value)}"
        case dict():
            return "an empty object" if not value else "an object with " + ", ".join(map(str, list(value)[:6]))
        case _:
            return str(value)[:40]


@dataclass(frozen=True)
class DataReport:
    """Counts are rows unless their name says responses. in = kept + bad + overlong + identical + empty."""

    split: str
    counts: Mapping[str, int]
    formats: Mapping[str, int]
    listings: Mapping[str, tuple[str, ...]]  # the first LISTED lines of each
    lengths: Mapping[str, int]  # quantiles of prompt + longest response in tokens, before `overlong`
    refusals: tuple[str, ...] = ()  # what no threshold excuses
    warnings: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()

    @property
    def dropped(self) -> int:
        """Rows that were fine to read but cannot be trained on."""
        return sum(self.counts.get(k, 0) for k in DROPPED)

    def listing(self, name: str, indent: str = "  ", shown: int = SHOWN) -> list[str]:
        """The first lines of a listing and how many more there are; [] where it is empty."""
        total = self.counts.get("problems" if name == "bad" else name, 0)
        lines = self.listings.get(name, ())[:shown]
        more = [f"... and {total - len(lines)} more"] if total > len(lines) else []
        return [indent + line for line in (*lines, *more)]

    def summary(self) -> str:
        """The report as text for a person, every listing capped at SHOWN lines."""
        c = Counter(self.counts)
        dropped = ", ".join(f"{c[k]} {k}" for k in DROPPED)
        out = [
            f"{self.split}: {c['in']} rows in = {c['kept']} kept + {c['bad']} bad + {self.dropped} dropped ({dropped})",
            "  format: " + (", ".join(f"{name} ({n})" for name, n in self.formats.items()) or "none"),
            f"  responses kept: {c['responses_kept']}; dropped from kept rows: {c['responses_overlong']} too long, "
            f"{c['responses_identical']} identical, {c['responses_empty']} empty; cut: {c['responses_cut']}",
        ]
        if self.lengths:
            quantiles = ", ".join(f"{name} {n}" for name, n in self.lengths.items())
            out.append(f"  prompt + longest response, tokens: {quantiles}")
        out += [f"  sample: {line}" for line in self.samples]
        for name, title in TITLES.items():
            if self.listings.get(name):
                out += [f"  {title}: {c[name]}", *self.listing(name, "    ")]
        return "\n".join(out + [f"  warning: {line}" for line in self.warnings])

    def to_json(self) -> dict[str, Any]:
        """Everything, for data_report.json and the cache."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataReport:
        """The inverse of to_json, also after a round trip through JSON text."""
        lists = {k: tuple(data[k]) for k in ("refusals", "warnings", "samples")}
        listings = {k: tuple(v) for k, v in data["listings"].items()}
        return cls(**{**data, **lists, "listings": listings})


@dataclass
class Tally:
    """A report while it is being made."""

    counts: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    listings: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, name: str, line: str) -> None:
        """Keep a line of a listing unless LISTED of them are there."""
        lines = self.listings.setdefault(name, [])
        if len(lines) < LISTED:
            lines.append(line)

    def bad(self, problems: list[Problem]) -> None:
        """Count one bad row and keep its problems."""
        self.counts["bad"] += 1
        self.counts["problems"] += len(problems)
        for problem in problems:
            self.keep("bad", str(problem))

"""All rows of a check, in little: one pass; then hashes and signatures are compared.

In memory stay, for each row, 40 bytes of hashes and lengths, 256 of a signature, 12 for each comparison it makes.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from po.data.read import Record
from po.prep.measure import NEARLY, Measured
from po.prep.report import LISTED

_SOURCES = 100  # whose rewards are told apart


@dataclass
class Moments:
    """Mean and spread of numbers that come one by one."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, x: float) -> None:
        """Take one in."""
        self.n += 1
        step = x - self.mean
        self.mean += step / self.n
        self.squares += step * (x - self.mean)
        self.least, self.most = min(self.least, x), max(self.most, x)

    def to_json(self) -> dict[str, float]:
        """n, mean, standard deviation, least, most."""
        std = math.sqrt(self.squares / self.n) if self.n else 0.0
        return {"n": self.n, "mean": self.mean, "std": std, "min": self.least, "max": self.most}


@dataclass
class Check:
    """The rows as they come in, then po.prep.findings and po.prep.figures say what they are."""

    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    listings: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, array[int]] = field(default_factory=dict)  # the numbers of the rows of a finding
    hashes: dict[str, array[int]] = field(default_factory=lambda: {n: array("Q") for n in ("id", "prompt", "content")})
    places: array[int] = field(default_factory=lambda: array("Q"))  # file and line of each row
    files: dict[str, int] = field(default_factory=dict)
    claims: array[int] = field(default_factory=lambda: array("Q"))
    claimants: array[int] = field(default_factory=lambda: array("I"))
    signatures: bytearray = field(default_factory=bytearray)
    lengths: dict[str, array[int]] = field(
        default_factory=lambda: {n: array("I") for n in ("prompt", "better", "worse")}
    )
    margins: array[float] = field(default_factory=lambda: array("f"))  # NaN where a pair has no rewards
    longest: array[int] = field(default_factory=lambda: array("I"))  # tokens
    rewards: dict[str, Moments] = field(default_factory=dict)
    length_reward: list[float] = field(default_factory=lambda: [0.0] * 6)  # n, x, y, xx, yy, xy of length and reward

    def add(self, record: Record, m: Measured) -> None:
        """One row."""
        self.counts["in"] += 1
        if m.problems:
            self.counts["bad"] += 1
            self.problems += [str(p) for p in m.problems[: max(0, LISTED - len(self.problems))]]
            return
        number = len(self.places)
        self.places.append(self._place(record.where))
        for name, value in (("id", m.row_id), ("prompt", m.prompt), ("content", m.content)):
            self.hashes[name].append(value)
        self.kinds[m.kind] += 1
        self.claims.extend(m.claims)
        self.claimants.extend([number] * len(m.claims))
        self.signatures += m.signature
        self.lengths["prompt"].append(m.prompt_length)
        self._pair(record, m)
        self._texts(record, m)

    def _pair(self, record: Record, m: Measured) -> None:
        if m.lengths is None:
            return
        for name, n in zip(("better", "worse"), m.lengths[1:]):
            self.lengths[name].append(n)
        self.margins.append(math.nan if m.margin is None else m.margin)
        if m.margin is not None and m.margin < 0:
            self._note("reward_against_choice", f"{record.where}: chosen is rewarded {-m.margin:g} less than rejected")
        if m.likeness >= NEARLY:
            name = "identical_pairs" if m.likeness == 1 else "nearly_identical_pairs"
            self._note(name, f"{record.where}: {m.likeness:.0%} alike")

    def _texts(self, record: Record, m: Measured) -> None:
        if m.language:
            self.languages[m.language] += 1
        for source, reward, length in m.scores:
            if source not in self.rewards and len(self.rewards) >= _SOURCES:
                source = "(further sources)"
            self.rewards.setdefault(source, Moments()).add(reward)
            s, x, y = self.length_reward, float(length), reward
            self.length_reward = [s[0] + 1, s[1] + x, s[2] + y, s[3] + x * x, s[4] + y * y, s[5] + x * y]
        if m.leak:
            self._note("test_prompts", f"{record.where}: the prompt of {m.leak}")
        if m.overlap:
            gram, where, share = m.overlap
            self._note("contaminated", f"{record.where}: {gram!r}, as in {where} ({share:.0%} of the prompt)")
        longest = m.tokens.pop("longest", None)
        if longest is not None:
            self.longest.append(longest)
        self.tokens.update(m.tokens)
        for name, line in m.lines.items():
            self._list(f"tokens_{name}", line)

    def _note(self, name: str, line: str) -> None:
        """Something about the row that came last."""
        self.counts[name] += 1
        self.noted.setdefault(name, array("I")).append(len(self.places) - 1)
        self._list(name, line)

    def _list(self, name: str, line: str) -> None:
        lines = self.listings.setdefault(name, [])
        if len(lines) < LISTED:
            lines.append(line)

    def _place(self, where: str) -> int:
        name, _, line = where.rpartition(":")
        row = line.startswith("row ")
        number = int(line.removeprefix("row "))
        return self.files.setdefault(f"{name}:row " if row else f"{name}:", len(self.files)) << 40 | number

    def where(self, number: int) -> str:
        """file:line of a row."""
        place = self.places[number]
        return list(self.files)[place >> 40] + str(place & ((1 << 40) - 1))


def run(check: Check, measured: Iterable[list[tuple[Record, Measured]]], seen: Callable[[int], None]) -> None:
    """Take all rows in; `seen` hears of every group."""
    for group in measured:
        for record, m in group:
            check.add(record, m)
        seen(len(group))

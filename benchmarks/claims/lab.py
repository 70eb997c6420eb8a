"""What the claims share: training on derived rows, one number per seed, a table, verdicts by paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.derive import write
from harness.runs import Trained, Training, fit, measure
from harness.stats import Interval, interval, verdict
from harness.world import Row, World


@dataclass
class Finding:
    """What a reproduction found."""

    title: str
    claim: str  # what the paper says, in our words
    setting: str  # what was trained and measured
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    verdicts: list[tuple[str, Interval, str]] = field(default_factory=list)

    def expect(self, what: str, values: Sequence[float], least: float = 0.0) -> None:
        """A part of the claim: these values, one per seed, are above `least` on average."""
        found = interval(values)
        self.verdicts.append((what, found, verdict(found, least)))

    def text(self) -> str:
        """As markdown."""
        lines = [f"### {self.title}", "", self.claim, "", self.setting, ""]
        lines += [f"| {' | '.join(self.header)} |", "|" + "---|" * len(self.header)]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        lines += ["", *(f"- {what}: {found.text()} -> **{said}**" for what, found, said in self.verdicts)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Numbers and verdicts."""
        verdicts = [{"what": w, "mean": i.mean, "half": i.half, "verdict": v} for w, i, v in self.verdicts]
        return {"title": self.title, "rows": [list(r) for r in self.rows], "verdicts": verdicts}


@dataclass(frozen=True)
class Lab:
    """A sandbox and a folder for derived rows. steps: how much of each claim's training is done (tests: little)."""

    world: World
    folder: Path
    share: float = 1.0

    def steps(self, count: int) -> int:
        return max(2, round(count * self.share))

    def rows(self, name: str, rows: Sequence[Row]) -> Path:
        return write(self.folder / "rows" / f"{name}.jsonl", rows)

    def train(
        self,
        term: Mapping[str, Any],
        rows: Path,
        seed: int,
        steps: int,
        at: Sequence[int] = (),
        look: Callable[[int, Any], None] = lambda step, plain: None,
        **how: Any,
    ) -> Trained:
        return fit(self.world, Training((term,), rows, seed, self.steps(steps), **how), at, look)

    def score(self, plain: Any, seed: int) -> dict[str, float]:
        """True reward, KL and moves of log-probs; other sampling noise for each seed."""
        return measure(self.world, plain, 1 + seed)


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Differences by seed."""
    return [x - y for x, y in zip(a, b)]


def best_worst(row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's best and worst answer; the first among equals."""
    order = sorted(row["responses"], key=lambda a: -a["reward"])
    return order[0], order[-1]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows whose best answer is better than their worst."""
    return [r for r in rows if best_worst(r)[0]["reward"] > best_worst(r)[1]["reward"]]


def pair(row: Row, swapped: bool = False) -> dict[str, Any]:
    """The row's best and worst answer as a preference, or as its opposite."""
    sides = best_worst(row)[:: -1 if swapped else 1]
    made = [[{"role": "assistant", "content": a["content"]}] for a in sides]
    return {"id": row["id"], "prompt": row["prompt"], "chosen": made[0], "rejected": made[1]}

"""What became of every row of a step: counts that add up, first ids by reason, bad rows by file and line."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from po.data.report import Problem

LISTED = 500  # problems kept
IDS = 20  # ids kept per reason
SHOWN = 20  # problems printed
_PACKAGES = ("po", "datasets", "pyarrow", "datasketch", "py3langid", "transformers", "torch", "numpy")


@dataclass
class Tally:
    """The counts of a step so far. Kept with what was written, so that a resumed step goes on counting."""

    rows_in: int = 0
    rows_out: int = 0
    kept: int = 0  # input rows that gave at least one row
    bad: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)  # the first of each reason
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def drop(self, reason: str, row_id: str) -> None:
        """Count one dropped row under its reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        ids = self.ids.setdefault(reason, [])
        if len(ids) < IDS:
            ids.append(row_id.encode(errors="backslashreplace").decode())

    def spoil(self, problems: list[Problem]) -> None:
        """Count one bad row and list what is wrong with it."""
        self.bad += 1
        self.problem_count += len(problems)
        self.problems += [str(p) for p in problems[: max(0, LISTED - len(self.problems))]]

    def add(self, sums: Mapping[str, float]) -> None:
        """Add what a row counts beside itself (a format, tokens, a cost)."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value

    @property
    def figures(self) -> dict[str, float]:
        """The sums; of a name that begins with `mean ` the mean over the rows out."""
        rows = self.rows_out or 1
        return {k: round(v / rows, 6) if k.startswith("mean ") else v for k, v in self.sums.items()}


@dataclass(frozen=True)
class StepReport:
    """Input rows = kept + dropped + bad. `context` says what was run on what."""

    step: str
    tally: Tally
    context: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything, for OUTPUT.report.json."""
        return {"step": self.step, **asdict(self.tally), "sums": self.tally.figures, **self.context}

    def print(self, console: Console | None = None) -> None:
        """The counts as a table, then the bad rows."""
        console, t = console or Console(), self.tally
        table = Table(title=f"{self.step}: {self._result()}", title_justify="left")
        table.add_column("rows")
        table.add_column("count", justify="right")
        table.add_column("first ids", overflow="fold")
        table.add_row("in", str(t.rows_in), "")
        table.add_row("kept", str(t.kept), "")
        for reason, count in t.dropped.items():
            table.add_row(escape(f"dropped: {reason}"), str(count), escape(", ".join(t.ids[reason][:3])))
        table.add_row("bad", str(t.bad), "")
        table.add_row("out", str(t.rows_out), "")
        for name, value in t.figures.items():
            table.add_row(escape(name), f"{value:g}" if value % 1 else str(int(value)), "")
        console.print(table)
        for line in t.problems[:SHOWN]:
            console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
        if t.problem_count > SHOWN:
            console.print(f"  ... and {t.problem_count - min(SHOWN, len(t.problems))} more")

    def _result(self) -> str:
        if self.context.get("dry_run"):
            return "dry run, nothing written"
        return Path(self.context["output"]["path"]).name + (
            "" if self.context["output"].get("sha256") else " (not done)"
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that rows go through."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

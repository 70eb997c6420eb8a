"""The parts of a check put together: sources, test sets, a tokenizer; the table that is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from po.data.formats import convert
from po.data.overlong import Limits
from po.data.read import Record
from po.data.sources import open_sources
from po.errors import UserError, suggest
from po.prep import near
from po.prep.batches import records
from po.prep.check import Check, run
from po.prep.findings import LIMITS, SHOWN, Finding
from po.prep.inputs import open_inputs
from po.prep.kept import Kept
from po.prep.measure import Measure
from po.prep.pool import in_order
from po.prep.rows import PROMPTS, WANTED
from po.prep.step import Outcome
from po.prep.texts import Tests, asked_of
from po.spec import Source


@dataclass(frozen=True)
class Asked:
    """What a check looks at beside the rows themselves."""

    tests: Sequence[Source] = ()
    ngram: int = 8
    near: bool = True
    language: bool = True
    tokenizer: Any = None
    limits: Limits | None = None
    num_proc: int = 1
    limit: int | None = None


def missing(asked: Asked) -> list[str]:
    """What cannot be looked at because a library is not installed."""
    lacking = []
    if asked.near and not near.available():
        lacking.append("near-duplicates (datasketch)")
    if asked.language:
        try:
            import py3langid  # noqa: F401
        except ImportError:
            lacking.append("languages (py3langid)")
    return lacking


def read_tests(sources: Sequence[Source], ngram: int) -> Tests:
    """The prompts of test sets. Raises UserError where a row has none."""
    tests, wanted = Tests(ngram), PROMPTS
    for one in open_sources(sources, "test"):
        for record in one.records():
            done = convert(record, one.source, wanted)
            if done.row is None:
                raise UserError("a row of the test sets cannot be read:\n" + "\n".join(map(str, done.problems[:5])))
            tests.add(asked_of(done.row), record.where)
    return tests


def check_rows(sources: Sequence[Source], asked: Asked, kept: Kept | None = None) -> Check:
    """One pass over the sources, behind what was `kept` of it."""
    opened, tests = open_inputs(sources), read_tests(asked.tests, asked.ngram)
    measure = Measure(
        sources[0],
        tests,
        near=asked.near and near.available(),
        language=asked.language and not any("py3langid" in m for m in missing(asked)),
        tokenizer=asked.tokenizer,
        limits=asked.limits,
    )
    check = (kept and kept.load()) or Check()
    check.counts["tests"] = len(tests.prompts)
    measured = in_order(records(opened, check.counts["in"], asked.limit), measure, asked.num_proc)
    with _counted() as advance:

        def seen(n: int) -> None:
            advance(n)
            if kept:
                kept.save(check)

        run(check, measured, seen)
    if kept:
        kept.save(check, last=True)
    return check


@contextmanager
def _counted() -> Iterator[Callable[[int], None]]:
    """A count on a terminal."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.completed} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda n: progress.advance(task, n)


@dataclass(frozen=True)
class LeaveOut:
    """The work of writing the rows of a check again, without those that have a reason to go."""

    reasons: Mapping[str, str]  # by file:line
    source: Source

    def __call__(self, record: Record) -> Outcome:
        """The row as it is, unless it has a reason; bad where po cannot read it."""
        reason = self.reasons.get(record.where)
        if reason is not None:
            return Outcome(dropped=reason)
        done = convert(record, self.source, WANTED)
        return Outcome(problem=done.problems) if done.row is None else Outcome((record.data or {},))


def allowed(pairs: Sequence[str]) -> dict[str, float]:
    """NAME=SHARE arguments."""
    out = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in LIMITS:
            raise UserError(f"--allow: unknown finding {name!r}.{suggest(name, LIMITS)} Known: {', '.join(LIMITS)}")
        try:
            out[name] = float(value)
        except ValueError:
            raise UserError(f"--allow: expected NAME=SHARE with a number, got {pair!r}") from None
    return out


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """The findings as a table, then the first places of what is not fine."""
    table = Table()
    for name in ("", "finding", "what was counted", "count", "share", "allowed"):
        table.add_column(
            name, justify="right" if name in ("count", "share", "allowed") else "left", no_wrap=name == "finding"
        )
    for f in findings:
        mark = "[green]ok[/]" if f.fine else "[red]no[/]"
        table.add_row(mark, f.name, f.says, str(f.count), f"{f.share:.2%}", f"{f.limit:.2%}")
    console.print(table)
    for f in findings:
        if f.count and not f.fine:
            console.print(f"{f.says}:")
            for line in f.examples[:SHOWN]:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            if len(f.examples) > SHOWN:
                console.print("  ... and others")


def show_figures(figures: Mapping[str, Any], console: Console) -> None:
    """The statistics, a line each; rewards as a table."""
    rows = figures["rows"]
    kinds = ", ".join(f"{n} {k}" for k, n in figures["kinds"].items())
    console.print(f"{rows['read']} of {rows['in']} rows read ({kinds}), {figures['prompts']} different prompts")
    if figures["languages"]:
        console.print("languages: " + ", ".join(f"{k} {v:.1%}" for k, v in list(figures["languages"].items())[:8]))
    for name, q in figures["characters"].items():
        console.print(f"characters, {name}: " + ", ".join(f"{k} {v:.0f}" for k, v in q.items()))
    both = figures.get("length_and_preference")
    if both:
        line = f"the preferred response is longer in {both['share_longer_preferred']:.1%} of {both['pairs']} pairs"
        console.print(f"{line} (means {both['mean_better']:.0f} and {both['mean_worse']:.0f} characters)")
        found = both["correlation_reward_length"]
        if found is not None:
            console.print(f"correlation of reward and length: {found:.3f}")
    if figures["rewards"]:
        table = Table(title="rewards by source", title_justify="left")
        for name in ("source", "n", "mean", "std", "min", "max"):
            table.add_column(name, justify="left" if name == "source" else "right")
        for source, m in list(figures["rewards"].items())[:15]:
            table.add_row(escape(source), str(m["n"]), *(f"{m[k]:.4g}" for k in ("mean", "std", "min", "max")))
        console.print(table)
    if "tokens" in figures:
        q = figures["tokens"]["prompt_and_longest_response"]
        console.print("tokens of prompt and longest response: " + ", ".join(f"{k} {v:.0f}" for k, v in q.items()))

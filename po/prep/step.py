"""The runner of every script in data_prep/: records in, rows out, each input row accounted for.

Streams; keeps the order; the same input and command give the same bytes, whatever `num_proc` and however often it was
killed and started again. What was done stays done: each half second of work is committed to the disk.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from po.data.read import Record
from po.data.report import Problem
from po.errors import UserError
from po.folder import redact
from po.prep.batches import Batch, Batches, batches, fine, records, worked
from po.prep.inputs import check_apart, command, describe, open_inputs
from po.prep.partial import Partial, beside, check_output, sha256
from po.prep.pool import in_order
from po.prep.report import StepReport, Tally, versions
from po.spec import Source

_COMMIT = 0.5  # seconds of work that a kill can undo


@dataclass(frozen=True)
class Outcome:
    """What became of one input row: rows out, or a reason why it was dropped, or what is wrong with it.

    One that is neither dropped nor bad and gives no rows counts as dropped ("gave no row"). `sums` are added up over
    all rows and printed with the counts (formats, responses left out, tokens, a cost).
    """

    rows: tuple[dict[str, Any], ...] = ()
    dropped: str | None = None
    problem: Problem | Sequence[Problem] | None = None
    sums: Mapping[str, float] = field(default_factory=dict)


Work = Callable[[Record], Outcome]
BatchWork = Callable[[list[Record]], Sequence[Outcome]]
Pool = Callable[[Batches], Generator[Sequence[Outcome], None, None]]  # the outcomes of each batch, in their order


def run_step(
    name: str,
    sources: Sequence[Source],
    output: Path,
    work: Work | None = None,
    *,
    options: Mapping[str, Any],
    num_proc: int = 1,
    limit: int | None = None,
    dry_run: bool = False,
    max_bad: float = 0.0,
    force: bool = False,
    batch_work: BatchWork | None = None,
    batch: Batch = 64,
    pool: Pool | None = None,
) -> StepReport:
    """Do `work` on each record, in order, and write its rows to `output`.

    options: all that decides the bytes beside the input; a partial output made with others is refused.
    batch_work: instead of `work`, takes `batch` records at once in this process and returns as many outcomes (models,
    servers); where `batch` is a function, adjacent records of the same key. Records that cannot be read reach neither.
    pool: instead of both, does the batches elsewhere (po.prep.on_ray).
    Raises UserError for a wrong call, and where more rows are bad than `max_bad` allows (a share below 1, a count from
    1 on); then the output stays partial, and running again with a higher one redoes nothing.
    """
    if [work, batch_work, pool].count(None) != 2:
        raise ValueError("expected one of work, batch_work and pool")
    opened, output = open_inputs(sources), Path(output)
    check_apart(opened, output)
    inputs = [described for one in opened for described in describe(one)]
    asked = {"step": name, "options": redact(dict(options)), "limit": limit}
    context = {"command": command(), **asked, "inputs": inputs, "output": {"path": str(output)}, "dry_run": dry_run}
    asked["inputs"] = [{k: v for k, v in one.items() if k != "path"} for one in inputs]

    def groups(start: int) -> Iterator[Group]:
        if work is not None:
            return in_order(records(opened, start, limit), _readable(work), num_proc)
        every = batches(opened, start, limit, batch)
        return _in_pool(every, pool) if pool else _batched(every, batch_work)

    if dry_run:
        check_output(output)
        report = StepReport(name, _count(groups(0), Tally()), {**context, "versions": versions()})
        return _judged(report, max_bad)
    written = Partial(output, asked, force)
    try:
        tally = Tally(**written.state.get("tally", {}))
        _write(groups(written.position), written, tally)
        return _finish(name, written, tally, context, max_bad)
    finally:
        written.close()


Group = list[tuple[Record, Outcome]]  # what is committed together or not at all


def _readable(work: Work) -> Work:
    return lambda record: _unreadable(record) or work(record)


def _unreadable(record: Record) -> Outcome | None:
    return Outcome(problem=record.problem) if record.data is None else None


def _batched(every: Batches, work: BatchWork | None) -> Iterator[Group]:
    assert work is not None
    for one in every():
        yield _joined(one, work(known) if (known := fine(one)) else ())


def _in_pool(every: Batches, pool: Pool) -> Iterator[Group]:
    """The records are read here once more, beside the outcomes."""
    with closing(pool(worked(every))) as outcomes:
        for one in every():
            yield _joined(one, next(outcomes) if fine(one) else ())


def _joined(batch: list[Record], outcomes: Sequence[Outcome]) -> Group:
    done = dict(zip((r.where for r in fine(batch)), outcomes, strict=True))
    return [(r, _unreadable(r) or done[r.where]) for r in batch]


def _count(groups: Iterable[Group], tally: Tally) -> Tally:
    started = time.monotonic()
    for group in _shown(groups):
        for record, outcome in group:
            _take(record, outcome, tally)
    tally.seconds += time.monotonic() - started
    return tally


def _take(record: Record, outcome: Outcome, tally: Tally) -> bytes:
    """Count one outcome and give its rows as lines."""
    lines, problem = b"", outcome.problem
    try:
        lines = b"".join(map(_line, outcome.rows))
    except (ValueError, TypeError, RecursionError) as e:
        problem = Problem(record.where, "", "values that JSON can hold", str(e))
    tally.rows_in += 1
    tally.add(outcome.sums)  # of a bad row too: what was asked about it was paid
    if problem is not None:
        tally.spoil([problem] if isinstance(problem, Problem) else list(problem))
        return b""
    if outcome.dropped is not None or not outcome.rows:
        row_id = (record.data or {}).get("id")
        tally.drop(outcome.dropped or "gave no row", record.where if row_id is None else str(row_id))
        return b""
    tally.kept += 1
    tally.rows_out += len(outcome.rows)
    return lines


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(row, allow_nan=False).encode() + b"\n"


def _write(groups: Iterable[Group], written: Partial, tally: Tally) -> None:
    """Append what comes, and commit it when half a second of work has gathered, also where the work is interrupted."""
    last, whole = time.monotonic(), True
    try:
        for group in _shown(groups):
            whole = False
            for record, outcome in group:
                written.write(_take(record, outcome, tally))
            whole = True
            if (now := time.monotonic()) - last >= _COMMIT:
                tally.seconds += now - last
                written.commit(tally.rows_in, asdict(tally))
                last = time.monotonic()
    finally:
        if whole:
            tally.seconds += time.monotonic() - last
            written.commit(tally.rows_in, asdict(tally))


def _shown(groups: Iterable[Group]) -> Iterator[Group]:
    """The groups, with a count on a terminal."""
    if not sys.stderr.isatty():
        yield from groups
        return
    columns = (SpinnerColumn(), TextColumn("{task.completed} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for group in groups:
            yield group
            progress.advance(task, len(group))


def _finish(name: str, written: Partial, tally: Tally, context: dict[str, Any], max_bad: float) -> StepReport:
    report = StepReport(name, tally, {**context, "versions": versions()})
    allowed = _excuse(report, max_bad)
    rendered = written.render() if allowed else None
    if rendered is not None:
        output = {"path": str(written.output), "bytes": rendered.stat().st_size, "sha256": sha256(rendered)}
        report = replace(report, context={**report.context, "output": output})
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    beside(written.output, ".report.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    if rendered is not None:
        written.place(rendered)
    return _judged(report, max_bad)


def _excuse(report: StepReport, max_bad: float) -> bool:
    t = report.tally
    return t.bad <= (max_bad * t.rows_in if max_bad < 1 else max_bad)


def _judged(report: StepReport, max_bad: float) -> StepReport:
    """Print the report; UserError where too many rows are bad."""
    report.print()
    if not _excuse(report, max_bad):
        t, output = report.tally, report.context["output"]["path"]
        then = "" if report.context["dry_run"] else f" {output} was not put in place; that redoes nothing."
        raise UserError(
            f"{t.bad} of {t.rows_in} rows are bad; --max-bad {max_bad:g} allows fewer. Mend them, or raise --max-bad "
            f"(a share below 1, a count from 1 on).{then}"
        )
    return report

"""The runner of data_prep's scripts: rows accounted for, kills, other commands, other formats."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from po.data.read import Record, read_file
from po.data.report import Problem
from po.errors import UserError
from po.prep.step import Outcome, run_step
from po.spec import Source


def write(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps({"id": f"r{i}", "n": i}) + "\n" for i in range(n)))
    return path


def work(record: Record) -> Outcome:
    """Multiples of 5 are dropped, 7 is bad, 3 gives two rows."""
    assert record.data is not None
    n = record.data["n"]
    if n % 5 == 0:
        return Outcome(dropped="multiple of five")
    if n == 7:
        return Outcome(problem=Problem(record.where, "n", "another number", "7"))
    return Outcome(rows=(record.data,) * (2 if n == 3 else 1), sums={"odd": n % 2})


def step(tmp_path: Path, output: str = "out.jsonl", **options: Any) -> Any:
    source = Source(str(write(tmp_path / "in.jsonl", 20)))
    given = {"options": {"k": 1}, "max_bad": 1} | options
    return run_step("test", [source], tmp_path / output, given.pop("work", work), **given)


def test_every_row_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t = step(tmp_path).tally
    assert (t.rows_in, t.kept, t.bad, t.dropped, t.rows_out) == (20, 15, 1, {"multiple of five": 4}, 16)
    assert t.rows_in == t.kept + t.bad + sum(t.dropped.values())
    assert t.ids == {"multiple of five": ["r0", "r5", "r10", "r15"]}
    assert t.sums == {"odd": 7}
    printed = capsys.readouterr().out
    assert "in.jsonl:8: n: expected another number, got 7" in printed
    assert "dropped: multiple of five" in printed
    numbers = [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert numbers == [1, 2, 3, 3, 4, 6, 8, 9, 11, 12, 13, 14, 16, 17, 18, 19]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    found = subprocess.run(["sha256sum", "out.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert report["output"]["sha256"] == found.stdout.split()[0]
    assert report["inputs"][0]["path"] == str(tmp_path / "in.jsonl")
    assert report["problems"] == ["in.jsonl:8: n: expected another number, got 7"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.report.json"]


def test_same_bytes_whatever_the_processes(tmp_path: Path) -> None:
    step(tmp_path)
    step(tmp_path, "two.jsonl", num_proc=2)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_zipped_and_parquet_read_back_the_same(tmp_path: Path) -> None:
    step(tmp_path)
    step(tmp_path, "out.jsonl.gz")
    step(tmp_path, "out.parquet")
    plain = [r.data for r in read_file(tmp_path / "out.jsonl", "x")]
    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == (tmp_path / "out.jsonl").read_bytes()
    assert [r.data for r in read_file(tmp_path / "out.parquet", "x")] == plain


def test_parquet_of_rows_that_differ(tmp_path: Path) -> None:
    """A field that only later rows have is null in the others; one of two types is refused and nothing is lost."""

    def later(record: Record) -> Outcome:
        n = record.data["n"]  # type: ignore[index]
        return Outcome(({"n": n, **({"m": [{"a": n}]} if n > 10 else {})},))

    def mixed(record: Record) -> Outcome:
        n = record.data["n"]  # type: ignore[index]
        return Outcome(({"n": n if n < 10 else "text"},))

    step(tmp_path, "out.parquet", work=later)
    assert [r.data for r in read_file(tmp_path / "out.parquet", "x")][9:12] == [
        *({"n": 9}, {"n": 10}),
        {"n": 11, "m": [{"a": 11}]},
    ]
    with pytest.raises(UserError, match="do not fit the columns of a Parquet file"):
        step(tmp_path, "mixed.parquet", work=mixed)
    assert len((tmp_path / "mixed.parquet.partial").read_text().splitlines()) == 20


def test_dry_run_writes_nothing_and_limit_stops(tmp_path: Path) -> None:
    assert step(tmp_path, dry_run=True).tally.rows_out == 16
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    assert step(tmp_path, limit=6).tally.rows_in == 6


def test_a_finished_output_is_kept_unless_forced(tmp_path: Path) -> None:
    step(tmp_path)
    with pytest.raises(UserError, match="exists; name another output, or overwrite it with --force"):
        step(tmp_path, limit=2)
    assert step(tmp_path, limit=2, force=True).tally.rows_in == 2
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_bad_rows_beyond_max_bad_leave_the_output_partial(tmp_path: Path) -> None:
    """Running again with a higher max_bad redoes nothing."""
    seen: list[int] = []

    def noted(record: Record) -> Outcome:
        seen.append(record.data["n"])  # type: ignore[index]
        return work(record)

    with pytest.raises(UserError, match=r"1 of 20 rows are bad; --max-bad 0 allows fewer"):
        step(tmp_path, max_bad=0.0, work=noted)
    assert not (tmp_path / "out.jsonl").exists()
    assert step(tmp_path, max_bad=0.1, work=noted).tally.bad == 1
    assert seen == list(range(20))


def test_unreadable_lines_and_values_json_cannot_hold_are_bad(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"a": 1}\nnonsense\n{"a": NaN}\n{"a": "\\ud800"}\n')
    sources = [Source(str(tmp_path / "in.jsonl"))]
    t = run_step("t", sources, tmp_path / "o.jsonl", lambda r: Outcome((r.data or {},)), options={}, max_bad=2).tally
    assert (t.rows_in, t.bad, t.rows_out) == (4, 2, 2)
    assert t.problems[0].startswith("in.jsonl:2: expected one JSON object per line")
    assert t.problems[1].startswith("in.jsonl:3: expected values that JSON can hold")
    assert json.loads((tmp_path / "o.jsonl").read_text().splitlines()[1]) == {"a": "\ud800"}


def test_batches_in_order(tmp_path: Path) -> None:
    sizes = []

    def together(records: list[Record]) -> list[Outcome]:
        sizes.append(len(records))
        return [work(r) for r in records]

    step(tmp_path)
    step(tmp_path, "batched.jsonl", work=None, batch_work=together, batch=8)
    assert sizes == [8, 8, 4]
    assert (tmp_path / "batched.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_an_interrupted_step_goes_on_and_a_different_command_is_refused(tmp_path: Path) -> None:
    seen: list[int] = []

    def stumbles(record: Record) -> Outcome:
        seen.append(record.data["n"])  # type: ignore[index]
        if len(seen) == 12:
            raise UserError("the server is gone")
        return work(record)

    with pytest.raises(UserError, match="the server is gone"):
        step(tmp_path, work=stumbles)
    with pytest.raises(UserError, match=r'a different command \(options: was {"k": 1}, is {"k": 2}\)'):
        step(tmp_path, options={"k": 2})
    t = step(tmp_path, work=stumbles).tally
    assert seen == [*range(12), *range(11, 20)]
    assert (t.rows_in, t.rows_out, t.dropped) == (20, 16, {"multiple of five": 4})


def test_folders_and_parquet_are_read_and_resumed(tmp_path: Path) -> None:
    import datasets

    rows = [{"id": f"r{i}", "n": i} for i in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "in.parquet"))
    step(tmp_path)
    for name in ("saved", "in.parquet"):
        seen: list[int] = []

        def stumbles(record: Record, seen: list[int] = seen) -> Outcome:
            seen.append(record.data["n"])  # type: ignore[index]
            if len(seen) == 12:
                raise UserError("the server is gone")
            return work(record)

        output, sources = tmp_path / f"{name}.jsonl", [Source(str(tmp_path / name))]
        with pytest.raises(UserError, match="the server is gone"):
            run_step("t", sources, output, stumbles, options={}, max_bad=1)
        t = run_step("t", sources, output, stumbles, options={}, max_bad=1).tally
        assert output.read_bytes() == (tmp_path / "out.jsonl").read_bytes()
        assert seen == [*range(12), *range(11, 20)]
        assert t.problems == [f"{name}:row 8: n: expected another number, got 7"]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    def nested(record: Record) -> Outcome:
        with pytest.raises(UserError, match="another process is writing it"):
            step(tmp_path, work=work, limit=1)
        return Outcome((record.data or {},))

    assert step(tmp_path, work=nested, limit=1).tally.rows_out == 1


def test_wrong_outputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an output that ends in \.jsonl, \.jsonl\.gz, \.parquet"):
        step(tmp_path, "out.csv")
    with pytest.raises(UserError, match="there is no folder"):
        step(tmp_path, "nowhere/out.jsonl")
    with pytest.raises(UserError, match="is an input as well"):
        step(tmp_path, "in.jsonl", force=True)
    with pytest.raises(UserError, match=r"^/nowhere\.jsonl not found in /"):
        run_step("t", [Source("/nowhere.jsonl")], tmp_path / "o.jsonl", work, options={})


def test_secrets_do_not_reach_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--api-key", "abc123", "--api-key=abc124", "sk-" + "a" * 20, "in.jsonl"])
    step(tmp_path, options={"api_key": "abc125"})
    report = (tmp_path / "out.jsonl.report.json").read_text()
    assert "abc12" not in report
    assert "aaaa" not in report
    assert "x.py --api-key '[redacted]' '--api-key=[redacted]' '[redacted]' in.jsonl" in report


_SLOW = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from po.prep.step import Outcome, run_step
    from po.spec import Source

    def work(record):
        with open(sys.argv[3], "a") as f:
            f.write(f"{record.data['n']}\\n")
        time.sleep(0.02)
        return Outcome((record.data, {"of": record.data["n"]}), sums={"n": record.data["n"]})

    def together(records):
        return [work(r) for r in records]

    how = sys.argv[4]
    how = {"work": work, "num_proc": int(how)} if how != "batch" else {"batch_work": together, "batch": 8}
    run_step("slow", [Source(sys.argv[1])], Path(sys.argv[2]), options={}, **how)
""")


@pytest.mark.parametrize("how", ["2", *(pytest.param(h, marks=pytest.mark.slow) for h in ("1", "batch"))])
def test_kill_9_loses_and_repeats_nothing_that_was_committed(tmp_path: Path, how: str) -> None:
    """Killed twice in the middle, with a torn line on the second: the same bytes as one that was left alone."""
    write(tmp_path / "in.jsonl", 200)
    output, log, progress = tmp_path / "out.jsonl", tmp_path / "log", tmp_path / "out.jsonl.progress.json"
    command = [sys.executable, "-c", _SLOW, str(tmp_path / "in.jsonl"), str(output), str(log), how]
    committed = [0]
    for _ in range(2):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            found = json.loads(progress.read_text())["position"] if progress.exists() else 0
            if found > committed[-1]:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.02)
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        committed.append(json.loads(progress.read_text())["position"])
        with open(tmp_path / "out.jsonl.partial", "ab") as f:
            f.write(b'{"torn": ')
    assert not output.exists()
    before = log.read_text().split()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = [json.dumps(row) for i in range(200) for row in ({"id": f"r{i}", "n": i}, {"of": i})]
    assert output.read_text().splitlines() == whole
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert (report["rows_in"], report["rows_out"], report["sums"]) == (200, 400, {"n": sum(range(200))})
    again = log.read_text().split()[len(before) :]
    assert sorted(map(int, again)) == list(range(committed[-1], 200)), "rows that were committed are not done again"
    assert not list(tmp_path.glob("out.jsonl.p*"))

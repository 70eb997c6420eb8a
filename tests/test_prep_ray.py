"""Batches done by Ray actors: the same bytes as in one process, one load per actor, kills and errors."""

from __future__ import annotations

import builtins
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

from po.data.read import Record
from po.errors import UserError
from po.prep.arguments import add_ray, batched, parser
from po.prep.on_ray import OnRay
from po.prep.step import BatchWork, Outcome, run_step
from po.spec import Source

# A script of its own, so that nothing of it can be imported where the actors run, as with those of data_prep/.
SCRIPT = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from po.errors import UserError
    from po.prep.arguments import add_ray, batched, end, parser
    from po.prep.step import Outcome, run_step
    from po.spec import Source

    folder = Path(sys.argv[1])

    def build():
        with open(folder / "loads", "a") as f:
            f.write(f"{os.getpid()}\\n")
        if (folder / "gone").exists():
            raise UserError("the model is gone")
        return together

    def together(records):
        with open(folder / "done", "a") as f:
            f.write("".join(f"{r.data['n']}\\n" for r in records))
        time.sleep(0.1)
        return [Outcome((r.data, {"with": [x.data["n"] for x in records]}), sums={"n": r.data["n"]}) for r in records]

    def main(argv):
        p = parser("x", "x")
        add_ray(p)
        args = p.parse_args(sys.argv[3:])
        source = [Source(str(folder / "in.jsonl"))]
        run_step("x", source, folder / sys.argv[2], options={}, batch=8, max_bad=1, **batched(args, build))

    if __name__ == "__main__":
        sys.exit(end(main))
""")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of fields that change their type, and one that cannot be read."""
    rows = [json.dumps({"n": i, "x": [None, "a", [1, {"b": "c"}]][i % 3]}) for i in range(400)]
    rows[13] = "nonsense"
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def command(folder: Path, output: str, *more: str) -> list[str]:
    return [sys.executable, str(folder / "script.py"), str(folder), output, *more]


def ran(folder: Path, output: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, output, *more), capture_output=True, text=True)


def lines(path: Path) -> list[str]:
    return path.read_text().split()


@pytest.mark.slow
def test_the_same_bytes_after_a_kill_and_one_load_per_actor(folder: Path) -> None:
    """Killed in the middle and started again; then what the script says when its model cannot be loaded."""
    pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
    assert ran(folder, "here.jsonl").returncode == 0
    assert len(lines(folder / "loads")) == 1
    (folder / "loads").unlink()
    (folder / "done").unlink()
    progress = folder / "ray.jsonl.progress.json"
    process = subprocess.Popen(command(folder, "ray.jsonl", "--ray", "2"), start_new_session=True)
    while process.poll() is None:
        if progress.exists() and json.loads(progress.read_text())["position"]:
            os.kill(process.pid, signal.SIGKILL)  # its actors must end by themselves
            process.wait()
        time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    position = json.loads(progress.read_text())["position"]
    assert position % 8 == 0
    while any(Path(f"/proc/{pid}").exists() for pid in lines(folder / "loads")):
        time.sleep(0.1)
    (folder / "done").unlink()
    (folder / "loads").unlink()
    done = ran(folder, "ray.jsonl", "--ray", "2")
    assert done.returncode == 0, done.stderr
    assert (folder / "ray.jsonl").read_bytes() == (folder / "here.jsonl").read_bytes()
    reports = [json.loads((folder / f"{name}.jsonl.report.json").read_text()) for name in ("here", "ray")]
    for name in ("rows_in", "rows_out", "kept", "bad", "problems", "sums", "options"):
        assert reports[0][name] == reports[1][name]
    redone = sorted(map(int, lines(folder / "done")))
    assert redone == [n for n in range(position, 400) if n != 13], "what was committed is not done again"
    loads = lines(folder / "loads")
    assert 1 <= len(loads) == len(set(loads)) <= 2
    (folder / "gone").touch()
    done = ran(folder, "other.jsonl", "--ray", "1")
    assert done.returncode == 2
    assert "error: the model is gone" in done.stderr


@pytest.mark.slow
def test_an_actor_that_dies_is_started_anew(folder: Path) -> None:
    pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
    assert ran(folder, "here.jsonl").returncode == 0
    (folder / "loads").unlink()
    progress = folder / "ray.jsonl.progress.json"
    process = subprocess.Popen(command(folder, "ray.jsonl", "--ray", "2"))
    while process.poll() is None and not (progress.exists() and json.loads(progress.read_text())["position"]):
        time.sleep(0.02)
    assert process.returncode is None, "it ended before an actor could be killed"
    os.kill(int(lines(folder / "loads")[0]), signal.SIGKILL)
    assert process.wait() == 0
    assert (folder / "ray.jsonl").read_bytes() == (folder / "here.jsonl").read_bytes()


def test_without_ray_the_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--ray: Ray Data is not installed .*; pip install 'po\[ray\]'"):
        run_step("x", [Source(str(folder / "in.jsonl"))], tmp_path / "o.jsonl", options={}, pool=OnRay(build, 1))
    assert json.loads((tmp_path / "o.jsonl.progress.json").read_text())["position"] == 0


def build() -> BatchWork:
    return lambda records: [Outcome((r.data or {},)) for r in records]


def test_nobody_at_the_address(folder: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    for address, said in (("127.0.0.1:1", "nobody answers there"), ("ray://head:1", "on a machine of the cluster")):
        with pytest.raises(UserError, match=f"--ray-address {address}: .*{said}"):
            next(OnRay(build, 1, address=address)(lambda: iter([])))


def test_arguments() -> None:
    p = parser("x", "x")
    add_ray(p)
    assert set(batched(p.parse_args([]), build)) == {"batch_work"}
    pool = batched(p.parse_args(["--ray", "3", "--ray-gpus", "0.5", "--ray-address", "auto"]), build)["pool"]
    assert (pool.actors, pool.gpus, pool.address) == (3, 0.5, "auto")
    with pytest.raises(UserError, match="go with --ray N"):
        batched(p.parse_args(["--ray-gpus", "1"]), build)
    with pytest.raises(UserError, match="--ray-gpus: expected 0 or more"):
        batched(p.parse_args(["--ray", "1", "--ray-gpus", "-1"]), build)
    p.add_argument("--teacher-url")
    with pytest.raises(UserError, match="is asked by one machine"):
        batched(p.parse_args(["--ray", "1", "--teacher-url", "http://x"]), build)


def test_a_pool_is_asked_for_batches_of_readable_records(folder: Path) -> None:
    """What any pool is given: the same batches as batch_work, each time that it asks, also behind a resumed step."""
    seen: list[list[int]] = []

    def pool(batches: Any) -> Any:
        again = [[r.data["n"] for r in one] for one in batches()]
        for one in batches():
            seen.append([r.data["n"] for r in one])
            assert seen[-1] in again
            if len(seen) == 3:
                raise UserError("the cluster is gone")
            yield [Outcome((r.data,)) for r in one]

    source = [Source(str(folder / "in.jsonl"))]
    with pytest.raises(UserError, match="the cluster is gone"):
        run_step("x", source, folder / "o.jsonl", options={}, batch=7, max_bad=1, pool=pool)
    t = run_step("x", source, folder / "o.jsonl", options={}, batch=7, max_bad=1, pool=pool).tally
    assert (t.rows_in, t.bad, t.rows_out) == (400, 1, 399)
    assert seen[1] == list(range(7, 13))
    assert seen[2] == seen[3] == list(range(14, 21))
    numbers = [json.loads(line)["n"] for line in (folder / "o.jsonl").read_text().splitlines()]
    assert numbers == [n for n in range(400) if n != 13]


def test_one_way_of_working(folder: Path) -> None:
    def work(record: Record) -> Outcome:
        return Outcome((record.data or {},))

    with pytest.raises(ValueError, match="expected one of work, batch_work and pool"):
        run_step("x", [Source(str(folder / "in.jsonl"))], folder / "o", work, options={}, pool=OnRay(build, 1))

"""Time and peak memory of convert and check over many short rows.

    python benchmarks/prep_scale.py --rows 1000000 --num-proc 2

Rows are pairs of random sentences, 5 % of them duplicates or near-duplicates of earlier ones. Each script runs as its
own process; peak memory is that of the process and its workers together, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def write(path: Path, rows: int) -> None:
    """Pairs of 40 to 80 words in the form of TRL, with scores."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    earlier: list[dict[str, object]] = []
    with open(path, "w", encoding="utf-8") as f:
        for i in range(rows):
            row: dict[str, object] = {
                "prompt": " ".join(rng.choices(words, k=rng.randint(5, 15))),
                "chosen": " ".join(rng.choices(words, k=rng.randint(15, 35))),
                "rejected": " ".join(rng.choices(words, k=rng.randint(15, 35))),
                "score_chosen": rng.random() + 0.5,
                "score_rejected": rng.random(),
                "source": f"source{i % 7}",
            }
            if earlier and rng.random() < 0.05:
                row = dict(rng.choice(earlier))
                if rng.random() < 0.5:
                    row["chosen"] = f"{row['chosen']} {rng.choice(words)}"
            elif len(earlier) < 10000:
                earlier.append(row)
            f.write(json.dumps(row) + "\n")


def measured(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Seconds, peak GiB (proportional set size: pages that processes share count once) and the exit code."""
    started, peak = time.monotonic(), 0.0
    log = open(folder / "log", "a")  # noqa: SIM115
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
    log.close()
    return time.monotonic() - started, peak / 2**30, process.returncode


def _memory(pid: int) -> float:
    total = 0.0
    try:
        parent = psutil.Process(pid)
        for one in (parent, *parent.children(recursive=True)):
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return total


def main() -> None:
    """Generate, convert, check, print a line for each."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=1_000_000)
    p.add_argument("--num-proc", type=int, default=2)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "raw.jsonl", args.rows)
        print(f"{args.rows} rows, {(folder / 'raw.jsonl').stat().st_size / 2**20:.0f} MiB, {args.num_proc} processes")
        workers = ["--num-proc", str(args.num_proc)]
        commands = {
            "convert": ["raw.jsonl", "-o", "rows.jsonl", *workers],
            "check": ["rows.jsonl", "--json", "check.json", "--html", "check.html", *workers],
        }
        for script, rest in commands.items():
            seconds, peak, code = measured([sys.executable, str(ROOT / "data_prep" / f"{script}.py"), *rest], folder)
            print(f"{script}: {seconds:.1f} s, {peak:.2f} GiB at most, exit code {code}", flush=True)
        found = {f["name"]: f["count"] for f in json.loads((folder / "check.json").read_text())["findings"]}
        print("found: " + ", ".join(f"{n} {c}" for n, c in found.items() if c))


if __name__ == "__main__":
    main()

"""Raw files to adapters by the README's own commands: every row accounted for, losses and exports sound."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "stories260k"
RAW = ("alpaca_sets", "gsm8k_solutions")
RECIPE = """
model: {{name_or_path: {model}}}
lora: {{r: 4, alpha: 8}}
reference: {{from: init}}
data:
  train: {{path: pairs.jsonl}}
  max_length: 512
  overlong: truncate_response
  max_dropped: 1.0
loss:
  - {{head: dpo, beta: 0.1}}
train: {{learning_rate: 1.0e-4, per_device_train_batch_size: 4, max_steps: {steps}, logging_steps: 1}}
output_dir: runs/run
"""
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="../shared, with its raw files and model, is not here")


def commands() -> list[list[str]]:
    """The README's, in its order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## From raw answers to an adapter")[1].split("\n## ")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("    ")]


def run(folder: Path, words: list[str], *more: str) -> str:
    """A command of the README, in a folder."""
    start = {"python": [sys.executable, str(ROOT / words[1])], "po": [sys.executable, "-m", "po.cli", words[1]]}
    command = [*start[words[0]], *words[2:], *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def prepared(folder: Path, name: str, steps: int) -> None:
    shutil.copy(SHARED / "data" / f"{name}.jsonl.gz", folder / "raw.jsonl.gz")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=MODEL, steps=steps))


def report(folder: Path, name: str) -> dict[str, Any]:
    """A step's report, whose counts must add up."""
    found: dict[str, Any] = json.loads((folder / f"{name}.jsonl.report.json").read_text())
    assert found["rows_in"] == found["kept"] + sum(found["dropped"].values()) + found["bad"]
    assert found["rows_out"] == (folder / f"{name}.jsonl").read_bytes().count(b"\n")
    return found


def check_run(folder: Path, name: str, rows: int, steps: int) -> None:
    """All rows read, all losses finite, and the export is what was trained."""
    run_dir = folder / "runs" / name
    counts = json.loads((run_dir / "data_report.json").read_text())["train"]["counts"]
    left = sum(counts[k] for k in ("bad", "overlong", "identical", "empty"))
    assert (counts["in"], counts["bad"]) == (rows, 0)
    assert counts["in"] == counts["kept"] + left
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps
    assert all(map(math.isfinite, losses))
    drift = json.loads((run_dir / "export-adapter" / "export.json").read_text())["drift"]
    assert drift["largest"] == 0.0
    assert drift["tokens"] > 0


def test_the_readmes_commands_are_the_whole_way() -> None:
    words = [c[1] if c[0] == "python" else f"po {c[1]}" for c in commands()]
    names = ("convert", "check", "pair", "subset")
    convert, check, pair, subset = (f"data_prep/{n}.py" for n in names)
    assert words == [convert, check, pair, "po train", "po export", subset, "po train", "po export"]


def test_a_few_rows_of_one_file(tmp_path: Path) -> None:
    prepared(tmp_path, "gsm8k_solutions", steps=1)
    convert, check, pair, train, export, *_ = commands()
    run(tmp_path, convert, "--limit", "40")
    for one in (check, pair, train, export):
        run(tmp_path, one)
    found = [report(tmp_path, name) for name in ("rows", "clean", "pairs")]
    assert [f["rows_in"] for f in found] == [40, found[0]["rows_out"], found[1]["rows_out"]]
    check_run(tmp_path, "pairs", found[2]["rows_out"], steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RAW)
def test_all_rows_by_all_commands(tmp_path: Path, name: str) -> None:
    """What the table in docs/evidence.md says."""
    prepared(tmp_path, name, steps=4)
    for one in commands():
        run(tmp_path, one)
    rows, clean, pairs, sets = (report(tmp_path, n) for n in ("rows", "clean", "pairs", "sets"))
    assert rows["bad"] == clean["bad"] == pairs["bad"] == sets["bad"] == 0
    assert rows["rows_out"] == clean["rows_in"]
    assert clean["rows_out"] == pairs["rows_in"] == sets["rows_in"]
    ties = {"alpaca_sets": (400, 5), "gsm8k_solutions": (700, 321)}[name]
    assert (rows["rows_in"], pairs["dropped"]) == (ties[0], {"equal rewards": ties[1]})
    assert sets["dropped"] == pairs["dropped"]
    check_run(tmp_path, "pairs", pairs["rows_out"], steps=4)
    check_run(tmp_path, "sets", sets["rows_out"], steps=4)

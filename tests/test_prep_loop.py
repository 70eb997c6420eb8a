"""The commands of docs/data_prep.md, "A loop", run as they stand there, on a small sandbox."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_online_sandbox import MICRO

from po.sandbox import build
from po.sandbox.rewards import true_reward

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """All, but for building the sandbox."""
    section = (ROOT / "docs/data_prep.md").read_text("utf-8").split("## A loop")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line]
    assert lines[0].startswith("python -m po.sandbox build")
    return ["mkdir -p runs/loop", *lines[1:]]


@pytest.mark.slow
def test_two_iterations(tmp_path: Path) -> None:
    build(tmp_path / ".sandbox", 3, MICRO)
    for name in ("data_prep", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    for line in commands():
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    loop = tmp_path / "runs/loop"
    for i in (1, 2):
        counts = {n: json.loads((loop / f"{n}-{i}.jsonl.report.json").read_text()) for n in ("sampled", "scored")}
        assert {c["rows_in"] for c in counts.values()} == {MICRO.train}
        rows = [json.loads(line) for line in (loop / f"pairs-{i}.jsonl").read_text().splitlines()]
        assert rows
        for row in rows:
            better, worse = row["responses"]
            assert better["reward"] > worse["reward"]
            assert true_reward([row["prompt"]], [better["content"]]) == [better["reward"]]
            assert better["token_ids"]
        assert json.loads((loop / f"train-{i}/report.json").read_text())["questions"] == MICRO.held_out
    first, second = (load_file(loop / f"train-{i}/export-adapter/adapter_model.safetensors") for i in (1, 2))
    assert any((first[name] != second[name]).any() for name in first)

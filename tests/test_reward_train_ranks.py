"""The same reward model from one process, two ranks and ZeRO. Real processes, gloo, one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from reward_train_support import ORDINAL, pairs, tree
from safetensors.torch import load_file
from test_distribution import ROOT, deepspeed, split, torchrun
from tiny import make_model

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rm-ranks")
    make_model(root / "net", initializer_range=0.2)
    pairs(root / "rows.jsonl", 11)  # 8 a step: the last step leaves ranks with fewer rows, or none
    kinds = {"bt": {"kind": "bradley_terry", "label_smoothing": 0.1}, "ordinal": ORDINAL}
    for name, objective in kinds.items():
        data = {"eval": str(root / "rows.jsonl")}
        said = tree(root / "net", root / "rows.jsonl", root / "unused", objective=objective, data=data)
        (root / f"{name}.yaml").write_text(yaml.safe_dump(said))
        launch(root, name, f"{name}-plain", [sys.executable, "-m"])
    return root


def launch(world: Path, recipe: str, name: str, launcher: list[str], *overrides: str) -> Path:
    out = world / name
    command = [*launcher, "po.cli", "reward", "train", str(world / f"{recipe}.yaml"), f"output_dir={out}", *overrides]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return out


def compare(world: Path, recipe: str, out: Path) -> None:
    expected, found = (load_file(p / "model.safetensors") for p in (world / f"{recipe}-plain", out))
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # AdamW makes much of a gradient that is nearly 0
        gap = (found[name] - value).abs()
        assert gap.max() < 1e-3, name
        assert gap.mean() < 2e-5, name
    lines = [_lines(p / "metrics.jsonl") for p in (world / f"{recipe}-plain", out)]
    assert len(lines[0]) == 2
    for one, other in zip(*lines, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    reports = [(p / "reward_report.json").read_text() for p in (world / f"{recipe}-plain", out)]
    assert yaml.safe_load(reports[0])["evaluation"]["pairs"] == 11
    accuracies = [yaml.safe_load(r)["evaluation"]["accuracy"] for r in reports]
    assert accuracies[0] == pytest.approx(accuracies[1])


def _lines(path: Path) -> list[dict[str, float]]:
    return [found for line in path.open() if "loss" in (found := json.loads(line))]


@pytest.mark.parametrize("recipe", ["bt", "ordinal"])
def test_two_ranks_of_ddp(world: Path, recipe: str) -> None:
    compare(world, recipe, launch(world, recipe, f"{recipe}-ddp", [*torchrun(2), "-m"], *split(2, 2)))


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_under_the_deepspeed_launcher(world: Path, stage: str) -> None:
    launcher = [*deepspeed(2), "--module"]
    compare(world, "bt", launch(world, "bt", f"bt-{stage}", launcher, f"deepspeed={stage}", *split(4, 1)))


def test_lora_under_the_deepspeed_launcher(world: Path) -> None:
    lora = ("lora={r: 4}", "train.learning_rate=0.01")
    (world / "lora.yaml").write_text((world / "bt.yaml").read_text())
    launch(world, "lora", "lora-plain", [sys.executable, "-m"], *lora)
    launcher = [*deepspeed(2), "--module"]
    compare(world, "lora", launch(world, "lora", "lora-zero2", launcher, "deepspeed=zero2", *lora, *split(4, 1)))

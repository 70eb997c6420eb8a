"""The same weights from every launcher, number of ranks and ZeRO stage. Real processes, gloo, one machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, write_recipe, write_sets

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    write_sets(folder / "sets.jsonl", 11)  # 11 rows, 8 a step: the last step leaves ranks with fewer rows, or none
    write_recipe(
        folder / "recipe.yaml",
        folder / "model",
        folder / "sets.jsonl",
        folder / "unused",
        loss=[{"head": "infonca", "beta": 0.5}, {"head": "sft", "weight": 0.1}],
        train={"per_device_train_batch_size": 8, "num_train_epochs": 2},
    )
    launch(folder, "plain", [sys.executable])
    return folder


def launch(world: Path, name: str, launcher: list[str], *overrides: str) -> Path:
    """Run launch/train.py under a launcher; everything it started is gone afterwards."""
    out = world / name
    command = [*launcher, "launch/train.py", str(world / "recipe.yaml"), f"output_dir={out}", *overrides]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return out


def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def deepspeed(ranks: int) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port()]


def torchrun(ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port()]


def split(per_device: int, accumulation: int) -> list[str]:
    return [f"train.per_device_train_batch_size={per_device}", f"train.gradient_accumulation_steps={accumulation}"]


def compare(world: Path, out: Path) -> None:
    expected, found = (load_file(p / "adapter_model.safetensors") for p in (world / "plain", out))
    assert found.keys() == expected.keys()
    assert max(v.abs().max() for v in expected.values()) > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_of_ddp(world: Path) -> None:
    compare(world, launch(world, "ddp", torchrun(2), *split(2, 2)))


def test_two_ranks_of_zero3_under_the_deepspeed_launcher(world: Path) -> None:
    compare(world, launch(world, "zero3-2", deepspeed(2), "deepspeed=zero3", *split(4, 1)))


SLOW: list[Any] = [(stage, ranks) for ranks in (1, 2) for stage in (0, 1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), SLOW)
def test_every_zero_stage(world: Path, stage: int, ranks: int) -> None:
    name = f"slow-zero{stage}-{ranks}"
    compare(world, launch(world, name, deepspeed(ranks), f"deepspeed=zero{stage}", *split(2, 4 // ranks)))


@pytest.mark.slow
def test_zero3_trains_all_weights(world: Path) -> None:
    plain = launch(world, "full-plain", [sys.executable], "lora=null")
    zero3 = launch(world, "full-zero3", deepspeed(2), "deepspeed=zero3", "lora=null", *split(4, 1))
    expected, found = (load_file(p / "model.safetensors") for p in (plain, zero3))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_plain_python_with_a_zero_preset(world: Path) -> None:
    compare(world, launch(world, "alone", [sys.executable], "deepspeed=zero2"))

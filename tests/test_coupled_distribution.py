"""Steps taken together, sets in pieces and heads with modules of their own: the same weights on any ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distribution import deepspeed, launch, split, torchrun
from test_every_head import row
from tiny import make_model, write_recipe

from po.heads import HEADS

# head -> what its recipe says beside it
CASES: dict[str, dict[str, Any]] = {
    "kto": {},  # another row's response after each prompt; a statistic of the step
    "bco": {},  # state
    "infonca": {"max_tokens_per_forward": 12},  # sets in pieces: ranks have different numbers of them
    "sparsepo": {},  # a module of its own, hidden states and KL of the reference
    "dckd": {},  # a teacher's candidates
}


def world(folder: Path, head: str) -> Path:
    """A folder with a recipe that a plain process has trained from."""
    make_model(folder / "model")
    rows = "".join(json.dumps(row(i, HEADS[head].needs)) + "\n" for i in range(11))
    (folder / "rows.jsonl").write_text(rows)
    write_recipe(
        folder / "recipe.yaml",
        folder / "model",
        folder / "rows.jsonl",
        folder / "unused",
        loss=[{"head": head}],
        reference={"from": "init", "kind": "adapter_off"} if HEADS[head].needs.any_reference else "none",
        train={"per_device_train_batch_size": 8, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.5},
        **CASES[head],
    )
    launch(folder, "plain", [sys.executable])
    return folder


def compare(folder: Path, out: Path) -> None:
    for name in ("adapter_model.safetensors", "gates.safetensors"):
        assert (folder / "plain" / name).exists() == (out / name).exists()
        if (out / name).exists():
            expected, found = load_file(folder / "plain" / name), load_file(out / name)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["infonca"])
def test_two_ranks_of_ddp(tmp_path: Path, head: str) -> None:
    folder = world(tmp_path, head)
    compare(folder, launch(folder, "ddp", torchrun(2), *split(2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("head", list(CASES))
def test_zero_on_two_ranks(tmp_path: Path, head: str) -> None:
    folder = world(tmp_path, head)
    compare(folder, launch(folder, "zero2", deepspeed(2), "deepspeed=zero2", *split(2, 2)))
    compare(folder, launch(folder, "zero3", deepspeed(2), "deepspeed=zero3", *split(4, 1)))

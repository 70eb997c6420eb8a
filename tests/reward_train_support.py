"""Tiny reward-model recipes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import WORDS, make_model

from po.reward_model.recipe import load
from po.reward_model.spec import RewardRecipe

TEMPLATE = "w9 {prompt} w8 {completion} w7 "
RATINGS = ["w1", "w2", "w3", "w4", "w5", "w6"]
ORDINAL = {"kind": "ordinal", "template": TEMPLATE, "ratings": RATINGS}


def gpt2(folder: Path) -> Path:
    """A 2-layer GPT-2 with the tokenizer of `make_model`: learned positions, no pad token in its configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    make_model(folder)
    (folder / "model.safetensors").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 3, bos_token_id=1, eos_token_id=2, **size)).save_pretrained(
            folder
        )
    return folder


def pairs(path: Path, n: int, seed: int = 0, learnable: bool = True, **more: Any) -> Path:
    """n pairs whose chosen answer has words of one kind and the other words of another, or by chance."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        good, bad = (" ".join(rng.choices(half, k=rng.randint(1, 6))) for half in (WORDS[10:18], WORDS[18:26]))
        if not learnable and rng.random() < 0.5:
            good, bad = bad, good
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(2, 6))) + " "
        rows.append({"id": f"p{i}", "prompt": prompt, "chosen": good, "rejected": bad} | more)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def tree(net: Path, rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values."""
    train = {"learning_rate": 0.003, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}
    return {
        "model": {"name_or_path": str(net), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 48, "cache_dir": str(rows.parent / "cache")}
        | changes.pop("data", {}),
        "train": train | {"disable_tqdm": True} | changes.pop("train", {}),
        "output_dir": str(out),
    } | changes


def recipe(net: Path, rows: Path, out: Path, **changes: Any) -> RewardRecipe:
    """The same, loaded."""
    path = rows.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(tree(net, rows, out, **changes)))
    return load(path)[0]


def copied(net: Path, to: Path) -> Path:
    """A copy of a model folder."""
    return Path(shutil.copytree(net, to))

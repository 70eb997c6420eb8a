"""Sets of many responses in little memory: peak memory and time against K, with and without max_tokens_per_forward.

    python benchmarks/large_sets.py         # about 3 minutes on 2 CPU cores

A 7 M-parameter llama with random weights and a LoRA adapter, InfoNCA with a cached reference, one prompt of ~200 tokens
with K responses of ~120 tokens per micro-batch, two of them per optimizer step. Each case in a process of its own;
timed is `trainer.train()`, and memory is the process's peak less what it held before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from vs_trl import make_world

ROWS, LIMIT = 4, 2048


def write_sets(folder: Path, K: int) -> Path:
    """ROWS prompts with K scored responses each."""
    generator = torch.Generator().manual_seed(K)

    def words(mean: float) -> str:
        n = int(((torch.randn((), generator=generator) * 0.4).exp() * mean).clamp(8, 800))
        return " ".join(f"w{i}" for i in torch.randint(8000, (n,), generator=generator).tolist())

    path = folder / f"sets-{K}.jsonl"
    with path.open("w") as out:
        for i in range(ROWS):
            responses = [{"content": words(120), "reward": (7 * k % K) / K} for k in range(K)]
            out.write(json.dumps({"id": str(i), "prompt": words(200) + " ", "responses": responses}) + "\n")
    return path


def run_case(folder: Path, K: int, limit: int | None) -> None:
    """In a process of its own: build, train, print one JSON line."""
    from po.recipe import load
    from po.run import build

    recipe = folder / f"k{K}-{limit}.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
                "lora": {"r": 16, "alpha": 32},
                "data": {"train": str(write_sets(folder, K)), "max_length": 4096, "cache_dir": str(folder / "cache")},
                "reference": {"from": "init", "kind": "cached", "cache_dir": str(folder / "cache")},
                "loss": [{"head": "infonca", "beta": 0.1}],
                "train": {
                    "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": 2,
                    "num_train_epochs": 1,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "disable_tqdm": True,
                },
                "max_tokens_per_forward": limit,
                "seed": 0,
                "output_dir": str(folder / f"run-{K}-{limit}-{os.getpid()}"),
            }
        )
    )
    trainer = build(*load(recipe, [])).trainer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    tokens = sum(trainer.train_dataset.sizes())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("RESULT " + json.dumps({"gib": peak, "wall": wall, "tokens": tokens, "loss": losses[-1]}), flush=True)


def measure(folder: Path, K: int, limit: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", str(folder), "--k", str(K), "--limit", str(limit or 0)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"K={K}, limit {limit} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(lines[-1][7:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        run_case(given.folder, given.k, given.limit or None)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), 1, 8192)
        print(f"\n{'K':>4}{'tokens/forward':>16}{'added peak GiB':>16}{'wall s':>8}{'us/unique tok':>15}{'loss':>10}")
        for K in (4, 16, 64):
            for limit in (None, LIMIT):
                r = measure(Path(folder), K, limit)
                us = 1e6 * r["wall"] / r["tokens"]
                print(
                    f"{K:4}{limit or 'all':>16}{r['gib']:16.2f}{r['wall']:8.1f}{us:15.0f}{r['loss']:10.4f}", flush=True
                )


if __name__ == "__main__":
    main()

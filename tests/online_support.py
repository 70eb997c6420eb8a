"""A run that samples, on a tiny model, with rewards of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny import WORDS, make_model, write_recipe

REWARDS = '''
def wanted(completions, wanted, **columns):
    """How many of the wanted words an answer has."""
    return [float(sum(w in text.split() for w in words.split())) for text, words in zip(completions, wanted)]

def late(completions, **columns):
    return [None if "w7" in text.split() else float(len(text.split()) > 4) for text in completions]

def odd(completions, **columns):
    """Equal for two answers every second time."""
    return [float(sum(int(w[1:]) for w in text.split() if w[0] == "w") % 2) for text in completions]

def broken(completions, **columns):
    raise ValueError("no such key")

def same(completions, **columns):
    return [1.0] * len(completions)

def nothing(completions, **columns):
    return [1.0 if text.startswith("gold") else 0.0 for text in completions]
'''


def write_prompts(path: Path, n: int, seed: int = 0, **more: Any) -> Path:
    """n rows of a prompt and the words that earn something."""
    rng = random.Random(seed)
    rows = [
        {"id": f"p{i}", "prompt": " ".join(rng.choices(WORDS, k=2 + i % 5)) + " ", "wanted": " ".join(WORDS[:30])}
        | more
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def online(
    folder: Path, loss: dict[str, Any] | None = None, prompts: int = 12, out: str = "run", **changes: Any
) -> Path:
    """A recipe of 4 samples of at most 8 tokens; `rollout` and `train` are merged in."""
    net = folder / "net"
    if not net.exists():
        make_model(net)
    (folder / "rewards.py").write_text(REWARDS)
    rows = changes.pop("rows", None) or write_prompts(folder / "prompts.jsonl", prompts)
    rollout = {"num_generations": 4, "max_completion_length": 8, "rewards": [f"{folder}/rewards.py:wanted"]}
    rollout |= changes.pop("rollout", {})
    changes.setdefault("reference", {"from": "init", "kind": "adapter_off"})
    loss = loss or {"head": "grpo"}
    return write_recipe(folder / f"{out}.yaml", net, rows, folder / out, loss=[loss], rollout=rollout, **changes)


def journal(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a run has sampled."""
    return [json.loads(line) for line in (run / "rollouts" / f"rank{rank}.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

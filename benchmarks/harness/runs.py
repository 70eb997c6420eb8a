"""One training run on po's own road (recipe file, po.run.build, POTrainer), in this process, and what it changed."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from harness.world import World
from po.recipe import load
from po.run import build
from po.sandbox import reward, sample
from po.sandbox.sampling import log_probs

LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Training:
    """What differs between runs; everything else is the same for all."""

    loss: tuple[Mapping[str, Any], ...]
    rows: Path
    seed: int = 0
    steps: int = 50
    batch: int = 8  # groups, or responses where the layout is unpaired
    learning_rate: float = 1e-3
    reference: str = "cached"
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, model: Path, folder: Path) -> dict[str, Any]:
        """As YAML would say it."""
        train = {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, self.steps // 10),
            "per_device_train_batch_size": self.batch,
            "max_steps": self.steps,
            "logging_steps": max(1, self.steps // 5),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return {
            "model": {"name_or_path": str(model)},
            "lora": LORA,
            "reference": {"from": "init", "kind": self.reference},
            "data": {"train": str(self.rows), "max_length": 160, **self.data},
            "loss": [dict(term) for term in self.loss],
            "train": train | dict(self.train),
            "seed": self.seed,
            "output_dir": str(folder / "run"),
        }


@dataclass(frozen=True)
class Trained:
    """A finished run: the policy as a plain model, the network as it was trained, and the lines of its log."""

    plain: Any
    network: Any
    log: Sequence[Mapping[str, Any]]


def fit(
    world: World,
    training: Training,
    at: Sequence[int] = (),
    look: Callable[[int, Any], None] = lambda step, plain: None,
) -> Trained:
    """Train. look(step, policy as a plain model) is called after each step of `at`."""
    folder = Path(tempfile.mkdtemp(prefix="po-bench-"))
    try:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(training.recipe(world.folder / "model", folder)), "utf-8")
        with _told_to(folder / "output.txt"):
            recipe, _ = load(folder / "recipe.yaml")
            job = build(recipe)
            if at:
                job.trainer.add_callback(_Look(set(at), look))
            job.trainer.train()
        return Trained(plainly(job.trainer.model), job.trainer.model, job.trainer.state.log_history)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plainly(network: Any) -> Any:
    """A copy of a policy with its adapter merged, computing attention as transformers does."""
    plain = copy.deepcopy(network).merge_and_unload()
    plain.set_attn_implementation("sdpa")
    return plain.eval()


class _Look(TrainerCallback):
    def __init__(self, at: set[int], look: Callable[[int, Any], None]) -> None:
        self.at, self.look = at, look

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self.look(state.global_step, plainly(model))


@contextlib.contextmanager
def _told_to(path: Path) -> Iterator[None]:
    """What a run says goes to a file, and its warnings nowhere: a benchmark prints tables."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        yield


def environment(cache: Path) -> None:
    """One thread, and prepared rows and references in a folder of the benchmark's own. Before the first run."""
    os.environ["PO_CACHE"] = str(cache.resolve())
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)


def measure(world: World, plain: Any, seed: int, K: int = 4) -> dict[str, float]:
    """True reward and KL to the base on held-out questions (by K samples of the policy to each), and how far the
    log-probs of the base's best and worst answers to other questions have moved, in nats per answer."""
    given = sample(plain, world.tokenizer, world.held_out, K, seed)
    flat = [s for group in given for s in group]
    logratio_GK = (log_probs(plain, flat) - log_probs(world.model, flat)).view(-1, K).double()
    reward_GK = torch.tensor([[reward(q, s.text) for s in g] for q, g in zip(world.held_out, given)]).double()
    out = {
        "reward": reward_GK.mean().item(),
        "reward_se": (reward_GK.mean(1).std() / math.sqrt(len(reward_GK))).item(),
        "kl": logratio_GK.mean().item(),
        "kl_se": (logratio_GK.mean(1).std() / math.sqrt(len(logratio_GK))).item(),
        "exact": (reward_GK == 1).double().mean().item(),
        "length": sum(len(s.response_ids) for s in flat) / len(flat),
    }
    return out | moved(world, plain)


def moved(world: World, plain: Any) -> dict[str, float]:
    """Mean log pi - log base of the best and of the worst answer to questions that nobody trained on."""
    best = [world.encode(prompt, answer) for prompt, answer, _ in world.watched]
    worst = [world.encode(prompt, answer) for prompt, _, answer in world.watched]
    gap = [(log_probs(plain, side) - log_probs(world.model, side)).mean().item() for side in (best, worst)]
    return {"best": gap[0], "worst": gap[1]}

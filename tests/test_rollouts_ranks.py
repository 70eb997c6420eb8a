"""Runs that sample, on several ranks: the samples and the weights of one rank, whatever launches them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Job
from online_support import metrics, online
from safetensors.torch import load_file
from test_distribution import deepspeed, launch, split

from po.cli import main

RANKS = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
# head -> what its recipe says beside it
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "copg": {},
    "reinforce_pp": {},  # statistics of the step
    "ppo": {"max_tokens_per_forward": 40},  # and in pieces
}


def write(folder: Path, head: str, out: str = "plain", **rollout: Any) -> Path:
    """11 prompts, 8 a step and 16 a round: the last round leaves a rank with fewer prompts in one micro-batch and none
    in the next. Groups of 2 whose rewards are 0 or 1, so that many are equal and others are sampled for them."""
    words: dict[str, Any] = {"num_generations": 2, "sequences_per_call": 6}
    words |= {"rewards": [f"{folder}/rewards.py:odd"], "zero_variance": "refill", "refill_budget": 0.5}
    words |= {"steps_per_generation": 1, "num_iterations": 2} | rollout
    train = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.2}
    more = CASES[head]
    return online(folder, {"head": head}, 11, out, rollout=words, train=train, **more)


def journals(run: Path, ranks: int) -> dict[tuple[int, int], dict[str, Any]]:
    """What all ranks have sampled; each place once."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted((run / "rollouts").glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert found.setdefault((row["round"], row["place"]), row) is row, f"{path}: {row['id']} is sampled twice"
    assert len(list((run / "rollouts").glob("rank*.jsonl"))) == ranks
    return found


def compare(one: Path, many: Path, ranks: int = 2) -> None:
    expected, found = journals(one, 1), journals(many, ranks)
    assert expected.keys() == found.keys()
    for key, row in expected.items():
        assert len(row["responses"]) == 2
        for a, b in zip(row["responses"], found[key]["responses"], strict=True):
            assert {k: v for k, v in a.items() if k != "logps"} == {k: v for k, v in b.items() if k != "logps"}
            assert a["logps"] == pytest.approx(b["logps"], abs=1e-5)
    before, after = (load_file(p / "adapter_model.safetensors") for p in (one, many))
    assert before.keys() == after.keys()
    assert max(v.abs().max() for k, v in before.items() if "lora_B" in k) > 1e-3
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(metrics(one), metrics(many), strict=True):
        same = ("loss", "reward", "reward_std", "rollout/refilled", "rollout/staleness", "frac_reward_zero_std")
        for name in (*same, "sampling/sampling_logp_difference/mean"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-5), name


def run(words: list[str]) -> int:
    return main(["train", *words])


def test_two_ranks_of_ddp(tmp_path: Path) -> None:
    recipe = write(tmp_path, "grpo")
    many = [str(recipe), f"output_dir={tmp_path / 'ddp'}", *RANKS]
    jobs = [Job(tmp_path / "one.log", run, [str(recipe)]), Job(tmp_path / "two.log", run, many, world=2)]
    try:
        for job, ranks in zip(jobs, (1, 2)):
            assert job.wait() == [0] * ranks, job.said
    finally:
        for job in jobs:
            job.kill()
    refilled = [m["rollout/refilled"] for m in metrics(tmp_path / "plain") if "rollout/refilled" in m]
    assert sum(refilled) > 4
    compare(tmp_path / "plain", tmp_path / "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("head", list(CASES))
def test_zero2_on_two_ranks(tmp_path: Path, head: str) -> None:
    folder = written(tmp_path, head)
    compare(folder / "plain", launch(folder, "zero2", deepspeed(2), "deepspeed=zero2", *split(2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["copg", "ppo"])
def test_zero3_gathers_as_often_on_every_rank(tmp_path: Path, head: str) -> None:
    """Ranks differ in how many prompts they have and how many others they sample; a call too few would hang."""
    folder = written(tmp_path, head)
    compare(folder / "plain", launch(folder, "zero3", deepspeed(2), "deepspeed=zero3", *split(2, 2)))


@pytest.mark.slow
def test_two_steps_of_a_round_on_two_ranks(tmp_path: Path) -> None:
    folder = written(tmp_path, "grpo", steps_per_generation=2)
    compare(folder / "plain", launch(folder, "zero2", deepspeed(2), "deepspeed=zero2", *split(2, 2)))
    compare(folder / "plain", launch(folder, "zero3", deepspeed(2), "deepspeed=zero3", *split(1, 4)))


@pytest.mark.slow
def test_evaluation_on_two_ranks(tmp_path: Path) -> None:
    """5 prompts on 2 ranks: one call more on one of them."""
    recipe = write(tmp_path, "grpo")
    (tmp_path / "eval.jsonl").write_text("".join((tmp_path / "prompts.jsonl").read_text().splitlines(True)[:5]))
    text = recipe.read_text().replace("data:\n", f"data:\n  eval: {tmp_path / 'eval.jsonl'}\n", 1)
    text = text.replace("train:\n  ", "train:\n  eval_strategy: steps\n  eval_steps: 2\n  ", 1)
    (tmp_path / "recipe.yaml").write_text(text.replace("sequences_per_call: 6", "sequences_per_call: 2"))
    one = launch(tmp_path, "one", [sys.executable])
    two = launch(tmp_path, "two", deepspeed(2), "deepspeed=zero3", *split(2, 2))
    found = [[m["eval_reward"] for m in metrics(p) if "eval_reward" in m] for p in (one, two)]
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1])
    compare(one, two)


def written(folder: Path, head: str, **rollout: Any) -> Path:
    """A folder with a recipe that a plain process has trained from."""
    (folder / "recipe.yaml").write_text(write(folder, head, **rollout).read_text())
    launch(folder, "plain", [sys.executable])
    return folder

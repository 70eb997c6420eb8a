"""The sandbox's true reward for runs that sample, and its recipes from training to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from po.export import export_run
from po.recipe import load
from po.run import train
from po.sandbox import Pretraining, Sandbox, Size, build
from po.sandbox.demo import report
from po.sandbox.rewards import true_reward

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("o*-sandbox.yaml"))
MICRO = Size(
    train=8,
    eval=4,
    held_out=4,
    responses=3,
    pretraining=Pretraining(
        hidden_size=48, intermediate_size=96, layers=2, heads=2, vocab_size=400, steps=200, batch=8
    ),
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return build(tmp_path_factory.mktemp("sandbox") / "s", 3, MICRO)


def test_the_reward_takes_texts_and_conversations() -> None:
    ask = "Name two fruits and one tool."
    talk: Any = [{"role": "user", "content": ask}]
    said: Any = [{"role": "assistant", "content": "fig, saw."}]
    assert true_reward(prompts=[ask, talk, talk], completions=["fig, pear, saw.", said, ""], id=["a", "b", "c"]) == [
        1,
        pytest.approx(2 / 3),
        0,
    ]


def test_there_are_four_recipes() -> None:
    assert [p.stem for p in RECIPES] == [
        f"{n}-sandbox" for n in ("offpolicy-copg", "online-copg", "online-dpo", "online-grpo2")
    ]


ONE = "online-copg-sandbox"  # of the fast ones


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem == ONE else pytest.mark.slow) for p in RECIPES]
)
def test_recipe_from_training_to_report(path: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    """Two steps of it on a smaller sandbox: the adapter moves, exports, and is reported."""
    words = [f"model.name_or_path={sandbox.model}", f"data.train={sandbox.train}", f"data.eval={sandbox.eval}"]
    words += [f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'data'}"]
    words += ["train.max_steps=2", "data.max_length=256"]
    words += ["train.per_device_train_batch_size=4", "train.eval_steps=2", "train.logging_steps=1"]
    words += [f"reference.cache_dir={tmp_path / 'ref'}"] if "offpolicy" in path.stem else []
    train(*load(path, words))
    weights = load_file(tmp_path / "run/adapter_model.safetensors")
    assert max(w.abs().max().item() for name, w in weights.items() if "lora_B" in name) > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    if "online" in path.stem:
        assert all(0 <= line["reward"] <= 1 for line in lines if "reward" in line)
        assert 0 <= next(line["eval_reward"] for line in lines if "eval_reward" in line) <= 1
        samples = (tmp_path / "run/rollouts/rank0.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in samples]
        assert [len(row["responses"]) for row in found] == [load(path)[0].rollout.num_generations] * 8
        for row in found:
            texts = [r["content"] for r in row["responses"]]
            assert [r["reward"] for r in row["responses"]] == true_reward([row["prompt"]] * len(texts), texts)
    export_run(tmp_path / "run", None, merged=False)
    report(tmp_path / "run", sandbox.folder)
    assert json.loads((tmp_path / "run/report.json").read_text())["questions"] == 4

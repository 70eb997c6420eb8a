"""The training loop: no split changes the weights, the log says what happened, the start is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, write_pairs, write_recipe, write_sets

from po.errors import NumericsError
from po.forward import Forward
from po.recipe import load
from po.run import build, train

SETS = [{"head": "infonca", "beta": 0.5, "alpha": 2.0}, {"head": "sft", "weight": 0.1}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 21)
    write_sets(folder / "sets.jsonl", 13)
    return folder


def run(world: Path, name: str, **changes: Any) -> Path:
    out = world / name
    train(*load(write_recipe(world / f"{name}.yaml", world / "model", world / "pairs.jsonl", out, **changes)))
    return out


def weights(out: Path) -> torch.Tensor:
    files = [p for p in out.glob("*.safetensors") if not p.name.startswith("nonfinite")]
    return torch.cat([v.flatten() for _, v in sorted(load_file(files[0]).items())])


def logs(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case", ["pairs", "sets", *(pytest.param(c, marks=pytest.mark.slow) for c in ("full", "unshared"))]
)
def test_micro_batches_and_accumulation_change_nothing(world: Path, case: str) -> None:
    """Group and token units, LoRA and all weights; 21 and 13 rows leave an uneven last step."""
    changes: dict[str, Any] = {"data": {"train": str(world / "pairs.jsonl"), "cache_dir": str(world / "cache")}}
    if case == "sets":
        changes = {"data": changes["data"] | {"train": str(world / "sets.jsonl")}, "loss": SETS}
    if case == "full":
        changes |= {"lora": None}
    if case == "unshared":
        changes |= {"model": {"name_or_path": str(world / "model"), "dtype": "float32", "share_prefix": False}}
    outs = []
    for per_device, accumulation in [(4, 1), (1, 4), (2, 2)]:
        batches = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        outs.append(run(world, f"{case}-{per_device}x{accumulation}", **changes, train=batches | {"optim": "sgd"}))
    first = weights(outs[0])
    assert first.abs().max() > 1e-4
    for out in outs[1:]:
        torch.testing.assert_close(weights(out), first, rtol=0, atol=5e-6)
        for a, b in zip(logs(out), logs(outs[0]), strict=True):
            for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
                assert a.get(name) == pytest.approx(b.get(name), abs=1e-4)


@pytest.mark.parametrize("kind", ["cached", "frozen", "adapter_off"])
def test_every_kind_of_reference_trains_the_same(world: Path, kind: str) -> None:
    reference = {"from": "init", "kind": kind, "cache_dir": str(world / "cache")}
    out = run(world, f"reference-{kind}", reference=reference)
    expected = world / "reference-expected.pt"
    if not expected.exists():
        torch.save(weights(out), expected)
    torch.testing.assert_close(weights(out), torch.load(expected), rtol=0, atol=1e-5)
    assert logs(out)[0]["init/ref_gap"] < 1e-4


def test_the_log_starts_where_theory_says(world: Path) -> None:
    data = {"train": str(world / "pairs.jsonl"), "eval": str(world / "pairs.jsonl"), "cache_dir": str(world / "cache")}
    reference = {"from": "init", "kind": "adapter_off"}  # the same arithmetic to the bit, so that step 0 is all ties
    out = run(world, "log", data=data, reference=reference, train={"eval_strategy": "steps", "eval_steps": 3})
    first, *rest = [line for line in logs(out) if "loss" in line]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (first["rewards/accuracies"], first["rewards/ties"]) == (0.5, 1.0)
    assert rest[-1]["rewards/margins"] > 0
    assert {"grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "kl/token"} <= first.keys()
    assert {"perf/tokens_per_s", "perf/mfu", "perf/peak_gib", "lengths/chosen", "num_tokens"} <= first.keys()
    evals = [line for line in logs(out) if "eval_loss" in line]
    assert len(evals) == 2
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_loss/dpo"} <= evals[0].keys()
    assert evals[1]["eval_loss"] < evals[0]["eval_loss"]
    for name in ("recipe.resolved.yaml", "environment.json", "data_report.json", "adapter_model.safetensors"):
        assert (out / name).is_file()


def test_evaluation_is_exact_over_batches(world: Path) -> None:
    losses = []
    for size in (1, 5):
        data = {
            "train": str(world / "pairs.jsonl"),
            "eval": str(world / "sets.jsonl"),
            "cache_dir": str(world / "cache"),
        }
        path = write_recipe(
            world / f"eval-{size}.yaml",
            world / "model",
            world / "pairs.jsonl",
            world / f"eval-{size}",
            data=data,
            train={"per_device_eval_batch_size": size},
            loss=[{"head": "dpo", "beta": 0.5}, {"head": "sft", "weight": 0.3}],
        )
        losses.append(build(*load(path)).trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_wrong_reference_is_stopped_before_the_first_step(world: Path) -> None:
    make_model(world / "other", seed=1)
    path = write_recipe(world / "wrong.yaml", world / "model", world / "pairs.jsonl", world / "wrong")
    job = build(*load(path))
    wrong = write_recipe(
        world / "wrong-other.yaml",
        world / "model",
        world / "pairs.jsonl",
        world / "wrong-other",
        reference={"from": str(world / "other"), "kind": "frozen"},
    )
    planted = build(*load(wrong)).trainer.reference
    assert planted is not None
    planted.starts_at_policy = True
    job.trainer.reference, job.trainer.forward = planted, Forward(job.trainer.terms, planted)
    job.trainer.data_collator = replace(job.trainer.data_collator, reference=None)
    with pytest.raises(NumericsError, match="policy has not taken a step and yet differs from its reference"):
        job.trainer.train()


def test_pairs_stand_best_first_whatever_their_rewards_say(world: Path) -> None:
    from po.batch import Collate
    from po.data.rows import Example, Item

    example = Example("a", "f:1", (5,), ((6, 7), (8,)), reward=(0.0, 1.0), label=(1, -1), chosen_first=True)
    batch = Collate(best_first=True)([(example, Item(0, (0, 1)), True)])
    assert batch.head_input(torch.zeros(3), None).best_GK.tolist() == [[True, False]]
    assert Collate()([(example, Item(0, (0, 1)), True)]).head_input(torch.zeros(3), None).best_GK.sum() == 0


def test_running_out_of_memory_names_the_batch_and_ends_with_3(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real refusal of the CPU allocator, inside the heads' forward pass."""
    from po.endings import ending

    path = write_recipe(world / "oom.yaml", world / "model", world / "pairs.jsonl", world / "oom")
    job = build(*load(path))
    job.trainer.guard.watch = lambda *a: torch.empty(1 << 60)  # type: ignore[method-assign]
    assert ending(job.trainer.train) == 3
    said = capsys.readouterr().err
    assert "out of memory at step 1, in a micro-batch of 4 groups" in said
    assert "train.per_device_train_batch_size: half" in said

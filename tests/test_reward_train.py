"""Training reward models: tiny real networks, from recipe to the folder that po.rewards scores with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reward_train_support import ORDINAL, gpt2, pairs, recipe, tree
from safetensors.torch import load_file
from tiny import make_model, write_sets

from po.cli import main
from po.data.groups import Group
from po.errors import UserError
from po.policy import load_tokenizer
from po.reward_model.data import Batch, Collate, load_pairs
from po.reward_model.evaluate import Judged, by_strength, calibration, evaluate
from po.reward_model.model import Scorer, load, rating_ids
from po.reward_model.recipe import load as read_recipe
from po.reward_model.recipe import resolved_text
from po.reward_model.report import use
from po.reward_model.run import train
from po.rewards import build_rewards
from po.spec import RewardSpec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rm")
    make_model(root / "llama", initializer_range=0.2)
    gpt2(root / "gpt2")
    pairs(root / "train.jsonl", 48)
    pairs(root / "eval.jsonl", 40, seed=1)
    return root


def scored(world: Path, kind: str, **objective: Any) -> tuple[Any, Scorer, list[Group], Any]:
    said = ORDINAL if kind == "ordinal" else {"kind": "bradley_terry"}
    net = world / ("llama" if kind == "ordinal" else kind)
    one = recipe(net, world / "eval.jsonl", world / f"load-{kind}", objective=said | objective)
    tokenizer = load_tokenizer(one.model)
    rows = load_pairs(one, tokenizer).train
    torch.manual_seed(0)
    model: Any = load(one, tokenizer).double().eval()
    if kind != "ordinal":
        torch.nn.init.normal_(model.score.weight, std=0.3)
    scorer = Scorer(one.objective, tokenizer, rating_ids(one, tokenizer))
    return model, scorer, [Group(rows.examples[i.example], i) for i in rows.items], one


def batch(one: Any, groups: list[Group]) -> Batch:
    return Collate(one.objective)(groups)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "ordinal"])
def test_a_score_does_not_depend_on_the_batch(world: Path, kind: str) -> None:
    model, scorer, groups, one = scored(world, kind)
    together = scorer(model, batch(one, groups)).score_2N.chunk(2)
    for n, group in enumerate(groups[:8]):
        alone = scorer(model, batch(one, [group])).score_2N
        assert alone.tolist() == pytest.approx([together[0][n].item(), together[1][n].item()], abs=1e-9)
    assert together[0].std() > 0.01
    turned = scorer(model, batch(one, groups[::-1])).score_2N.chunk(2)[0].flip(0)
    torch.testing.assert_close(turned, together[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_score_does_not_depend_on_how_much_padding_there_is_nor_on_its_side(world: Path, kind: str) -> None:
    model, scorer, groups, one = scored(world, kind)
    short = batch(one, groups[:6])
    plain_2N = scorer(model, short).score_2N
    assert model.config.pad_token_id == 0
    for length in (max(map(len, short.sequences)), 40):
        rows = [[0] * (length - len(s)) + [*s] for s in short.sequences]
        mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in short.sequences])
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        left = model(input_ids=torch.tensor(rows), attention_mask=mask, position_ids=place).logits[:, 0]
        right = [[*s] + [0] * (length - len(s)) for s in short.sequences]
        more = model(input_ids=torch.tensor(right), attention_mask=mask.flip(-1)).logits[:, 0]
        torch.testing.assert_close(more, plain_2N)
        torch.testing.assert_close(left, plain_2N)


def numbers(folder: Path, one: Any, rows: Path, k: str) -> list[float]:
    spec = use(one, folder)
    rewards = build_rewards([RewardSpec(model=spec["model"], name="m", options=spec["options"] | {"dtype": "float32"})])
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    found = rewards([r["prompt"] for r in read], [r[k] for r in read])
    assert not rewards.counts, rewards.texts
    return [float(s.reward) for s in found if s.reward is not None]


@pytest.mark.parametrize(
    ("name", "net", "changes"),
    [
        ("full", "llama", {"objective": {"kind": "bradley_terry", "label_smoothing": 0.05}}),
        ("lora", "gpt2", {"lora": {"r": 4}, "train": {"learning_rate": 0.02}}),
        ("contrastive", "gpt2", {"objective": {"contrastive": 0.1, "dropout": 0.1, "features": "difference"}}),
        ("ordinal", "llama", {"objective": ORDINAL, "lora": {"r": 4}, "train": {"learning_rate": 0.02}}),
    ],
)
def test_it_learns_and_scoring_loads_what_it_wrote(world: Path, name: str, net: str, changes: dict[str, Any]) -> None:
    changes = json.loads(json.dumps(changes))
    changes["train"] = {"num_train_epochs": 4} | changes.get("train", {})
    one = recipe(world / net, world / "train.jsonl", world / name, data={"eval": str(world / "eval.jsonl")}, **changes)
    train(one)
    said = json.loads((world / name / "reward_report.json").read_text())
    found = said["evaluation"]
    assert found["pairs"] == 40
    assert found["accuracy"] > 0.85
    chosen, rejected = (numbers(world / name, one, world / "eval.jsonl", k) for k in ("chosen", "rejected"))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert sum(m > 0 for m in margins) / 40 == pytest.approx(found["accuracy"])
    assert sum(margins) / 40 == pytest.approx(found["margin"], abs=1e-4)
    lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval_loss" in line)
    assert last["eval_rewards/accuracies"] == pytest.approx(found["accuracy"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path, tolerance: float) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance)


def test_a_step_is_the_mean_of_its_pairs_however_it_is_cut(world: Path) -> None:
    pairs(world / "eleven.jsonl", 11)
    for name, per_device, accumulation in (("cut-8", 8, 1), ("cut-2", 2, 4)):
        how = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        train(recipe(world / "llama", world / "eleven.jsonl", world / name, train=how))
    same(world / "cut-8", world / "cut-2", 2e-5)
    first = [json.loads(line)["loss"] for line in (world / "cut-8" / "metrics.jsonl").open() if '"loss"' in line]
    other = [json.loads(line)["loss"] for line in (world / "cut-2" / "metrics.jsonl").open() if '"loss"' in line]
    assert first == pytest.approx(other, abs=1e-5)


def test_a_run_that_was_cut_off_ends_at_the_same_weights(world: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    one = recipe(world / "llama", world / "train.jsonl", world / "whole", train=how)
    train(one)
    shutil.copytree(world / "whole", world / "again")
    shutil.rmtree(world / "again" / "checkpoint-6")
    (world / "again" / "model.safetensors").unlink()
    train(replace(one, output_dir=str(world / "again"), resume=True))
    same(world / "whole", world / "again", 0)


def test_sets_become_pairs_and_columns_reach_the_loss(world: Path) -> None:
    write_sets(world / "sets.jsonl", 9)
    one = recipe(world / "llama", world / "sets.jsonl", world / "sets", data={"pairing": "all"})
    rows = load_pairs(one, load_tokenizer(one.model)).train
    assert len(rows) == sum((2 + i % 3) * (1 + i % 3) // 2 for i in range(9))
    pairs(world / "columns.jsonl", 4, margin=0.5, strength=2.0, preference=0.8)
    for margin, expected in (("margin", 0.5), ("strength", 2.0)):
        objective = {"margin": margin, "soft_labels": True}
        one = recipe(world / "llama", world / "columns.jsonl", world / "columns", objective=objective)
        rows = load_pairs(one, load_tokenizer(one.model)).train
        got = Collate(one.objective)([Group(rows.examples[i.example], i) for i in rows.items])
        assert got.margin_N is not None
        assert got.preference_N is not None
        assert got.margin_N.tolist() == [expected] * 4
        assert got.preference_N.tolist() == pytest.approx([0.8] * 4)


def test_a_loss_that_is_not_finite_ends_the_run_with_4_and_names_the_rows(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs(world / "infinite.jsonl", 3, margin=1e39)  # infinite in fp32
    path = world / "infinite.yaml"
    said = tree(world / "llama", rows, world / "infinite", objective={"margin": "margin"})
    path.write_text(yaml.safe_dump(said))
    assert main(["reward", "train", str(path)]) == 4
    error = capsys.readouterr().err
    assert "step 1: the loss is inf in rows" in error
    assert all(name in error for name in ("p0", "p1", "p2"))
    assert not (world / "infinite" / "model.safetensors").exists()


def test_margins_of_sets_are_refused(world: Path) -> None:
    rows = write_sets(world / "sets-margin.jsonl", 3)
    one = recipe(world / "llama", rows, world / "sets-margin", objective={"soft_labels": True})
    with pytest.raises(UserError, match="are those of a pair, and this row is a set"):
        load_pairs(one, load_tokenizer(one.model))


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"objectiv": {}}, {}, "objectiv: unknown key. Did you mean 'objective'?"),
    ({"objective": {"kind": "bradly"}}, {}, "expected a mapping with `kind` (bradley_terry, ordinal)"),
    ({"objective": {"centre": 0.1}}, {}, "objective.centre: the objective has no such key. Did you mean 'center'?"),
    ({"objective": {"label_smoothing": 0.5}}, {}, "expected a number >= 0 and < 0.5, got 0.5"),
    ({"objective": {"contrastive": 0.1}}, {}, "objective.dropout: is 0, and `contrastive` compares two passes"),
    ({"objective": {"temperature": 0.1}}, {}, "objective.temperature: has no effect without `contrastive`"),
    ({"objective": {"margin": "margin"}}, {}, "expected a number in column 'margin', found none"),
    ({"objective": {"soft_labels": True}}, {"preference": 1.5}, "preference: expected a probability from 0 to 1"),
    ({"objective": ORDINAL, "data": {"overlong": "truncate_prompt"}}, {}, "cannot be cut: write drop or error"),
    ({"objective": ORDINAL | {"ratings": ["w1 w2", "w3"]}}, {}, "'w1 w2' is not one token after the question"),
    ({"objective": ORDINAL | {"quality": "region", "levels": 4}}, {}, "there are not two for each level"),
    (
        {"objective": ORDINAL | {"quality": "triangle"}},
        {"chosen_quality": 1, "rejected_quality": 3},
        "the chosen answer is of level 1 and the rejected one of 3",
    ),
    ({"model": {"name_or_path": "?", "load_in_4bit": True}}, {}, "model.load_in_4bit: does not go with a reward model"),
    ({"lora": {"r": 4}, "deepspeed": "zero3"}, {}, "does not work under ZeRO-3"),
    ({"train": {"remove_unused_columns": True}}, {}, "train.remove_unused_columns: is not for the recipe's `train`"),
    ({"train": {"eval_strategy": "steps"}}, {}, "train.eval_strategy: needs evaluation rows"),
    ({"data": {"max_length": 5}}, {}, "were dropped or cut"),
    ({"ensemble": {"folds": 1}}, {}, "ensemble.folds: expected a whole number >= 2, got 1"),
]


@pytest.mark.parametrize(("changes", "more", "message"), WRONG)
def test_wrong_recipes_end_with_2_and_say_why(
    world: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    changes = json.loads(json.dumps(changes))
    rows = pairs(world / "wrong.jsonl", 4, **more)
    path = world / "wrong.yaml"
    path.write_text(yaml.safe_dump(tree(world / "llama", rows, world / "wrong", **changes)))
    assert main(["reward", "check", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes" / "reward").glob("*.yaml")))
def test_the_recipes_of_the_project_load_and_come_back_from_what_a_run_keeps(path: Path, tmp_path: Path) -> None:
    one, notes = read_recipe(path)
    assert not notes
    (tmp_path / "recipe.resolved.yaml").write_text(resolved_text(one))
    assert read_recipe(tmp_path / "recipe.resolved.yaml")[0] == one


def test_overrides_and_shorthands(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = world / "short.yaml"
    lines = (f"model: {world / 'llama'}", f"data: {world / 'train.jsonl'}", "objective: bradley_terry", "output_dir: x")
    path.write_text("\n".join(lines) + "\n")
    words = ["objective.center=0.1", "--train.per_device_train_batch_size", "4", f"data.cache_dir={world / 'cache'}"]
    assert main(["reward", "check", str(path), *words]) == 0
    assert "48 pairs; one rank makes 12 steps of 4 per epoch" in capsys.readouterr().out
    assert main(["reward", "check", str(path), "objective.centr=0.1"]) == 2
    assert "Did you mean 'center'?" in capsys.readouterr().err
    assert main(["reward", "check", str(path), "beta=0.1"]) == 2
    assert "command line: beta: unknown key." in capsys.readouterr().err
    assert main(["reward", "strength", str(path)]) == 2
    assert "expected -o OUTPUT" in capsys.readouterr().err


def judged(margin: float, preferred: float) -> Judged:
    return Judged(margin, 0.0, preferred, 1.0)


def test_calibration_counts_by_the_side_that_the_model_prefers() -> None:
    some = [judged(1, 0.72), judged(1, 0.78), judged(-1, 0.27), judged(-2, 0.02), judged(0, 0.5)]
    found = calibration(some)
    assert [(round(b.low, 2), b.pairs) for b in found] == [(0.5, 1), (0.7, 2), (0.75, 1), (0.95, 1)]
    assert found[1].said == pytest.approx((0.72 + 0.73) / 2)
    assert found[1].observed == 0.5
    assert found[0].observed == 0.5
    whole = evaluate(some, [None] * 5)
    gaps = [0.0, 2 * abs(0.725 - 0.5), abs(0.78 - 1), abs(0.98 - 0)]
    assert whole.ece == pytest.approx(sum(gaps) / 5)
    assert whole.accuracy == pytest.approx(2.5 / 5)


def test_a_model_that_says_what_is_so_has_no_calibration_error() -> None:
    some = [judged(1, 0.8)] * 80 + [judged(-1, 0.2)] * 20 + [judged(1, 0.6)] * 60 + [judged(-1, 0.4)] * 40
    assert evaluate(some, [None] * len(some)).ece == pytest.approx(0, abs=1e-9)
    by = {round(b.said, 2): b.observed for b in calibration(some)}
    assert by == {0.8: pytest.approx(0.8), 0.6: pytest.approx(0.6)}


def test_buckets_are_of_equal_size_by_strength() -> None:
    some = [judged(1 if i >= 4 else -1, 0.5) for i in range(12)]
    found = by_strength(some, [float(i) for i in range(12)])
    assert [b.pairs for b in found] == [3, 3, 2, 2, 2]
    assert [b.accuracy for b in found] == [0, pytest.approx(2 / 3), 1, 1, 1]
    assert evaluate(some, [1.0] * 12).strength == "the rows' strength"
    assert evaluate(some, [None, *[1.0] * 11]).strength == "the model's own |margin|"

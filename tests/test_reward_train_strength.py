"""The out-of-fold ensemble: no pair is judged by a model that saw it, and what it writes can be mended."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reward_train_support import pairs, recipe
from tiny import make_model, write_sets

from po.data.sources import open_sources
from po.errors import UserError
from po.prep.relabel import ByStrength
from po.prep.strength import Bands
from po.reward_model.run import train
from po.reward_model.strength import judges, strength
from po.spec import Source

TRAIN = {"num_train_epochs": 15, "per_device_train_batch_size": 24, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strength")
    make_model(root / "net", initializer_range=0.2)
    rows = [json.loads(line) for line in pairs(root / "chance.jsonl", 24, learnable=False).open()]
    for one, other in pairwise(rows[:6]):
        other["prompt"] = one["prompt"]  # six pairs of one prompt
    (root / "chance.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def test_folds_hold_prompts_together_and_judge_every_pair_once_per_member() -> None:
    prompts = [f"prompt {i % 7}" for i in range(30)]
    found = judges(prompts, folds=3, members=4, seed=0)
    assert len(found) == 12
    for judge in found:
        seen, held = ({prompts[i] for i in some} for some in (judge.trained, judge.held))
        assert not seen & held
        assert sorted(judge.trained + judge.held) == list(range(30))
    for member in range(4):
        assert sorted(i for j in found if j.member == member for i in j.held) == list(range(30))
    assert len({tuple(j.held for j in found if j.member == m) for m in range(4)}) == 4


def in_fold(world: Path) -> float:
    """The share of chance labels that a model trained on them agrees with."""
    rows = str(world / "chance.jsonl")
    one = recipe(world / "net", world / "chance.jsonl", world / "saw", train=TRAIN, data={"eval": rows})
    train(one)
    return float(json.loads((world / "saw" / "reward_report.json").read_text())["evaluation"]["accuracy"])


def judged(world: Path, output: str, **changes: Any) -> list[dict[str, Any]]:
    one = recipe(world / "net", world / "chance.jsonl", world / "ensemble", train=TRAIN, **changes)
    strength(one, world / output)
    return [json.loads(line) for line in (world / output).open()]


def test_models_that_did_not_see_a_label_do_not_know_it(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = judged(world, "judged.jsonl", ensemble={"folds": 2, "members": 2})
    assert [len(r["margins"]) for r in rows] == [2] * 24
    members = {p.name: json.loads(p.read_text()) for p in (world / "judged.jsonl.members").glob("*-*.json")}
    assert sorted(members) == ["0-0.json", "0-1.json", "1-0.json", "1-1.json"]
    prompt = {f"chance.jsonl:{n}": r["prompt"] for n, r in enumerate(rows, 1)}
    for one in members.values():
        assert not set(one["trained"]) & set(one["margins"])
        assert not {prompt[i] for i in one["trained"]} & {prompt[i] for i in one["margins"]}
    for n, r in enumerate(rows, 1):
        given = [members[f"{m}-{k}.json"]["margins"].get(f"chance.jsonl:{n}") for m in (0, 1) for k in (0, 1)]
        assert r["margins"] == [x for x in given if x is not None]
    agreed = sum(sum(r["margins"]) > 0 for r in rows) / len(rows)
    assert in_fold(world) > 0.95
    assert agreed < 0.75
    (world / "judged.jsonl.members" / "0-1.json").unlink()
    (world / "judged.jsonl").rename(world / "first.jsonl")
    capsys.readouterr()
    assert judged(world, "judged.jsonl", ensemble={"folds": 2, "members": 2}) == rows
    said = capsys.readouterr().err
    assert said.count("found in") == 3
    assert said.count("training on") == 1


def test_repair_reads_what_it_writes(world: Path) -> None:
    path = world / "first.jsonl"
    source = Source(str(path))
    (one,) = open_sources([source], "input")
    rows = [ByStrength(source, Bands())(record).rows[0] for record in one.records()]
    turned = [r for r in rows if r["flipped"]]
    assert 0 < len(turned) < 24
    assert all(r["strength"] >= 0 for r in rows)


def test_sets_and_too_many_folds_are_refused(world: Path) -> None:
    write_sets(world / "sets.jsonl", 6)
    with pytest.raises(UserError, match=r"expected pairs, found answers with rewards; data_prep/pair.py makes"):
        strength(recipe(world / "net", world / "sets.jsonl", world / "sets"), world / "none.jsonl")
    (world / "there.jsonl").touch()
    with pytest.raises(UserError, match=r"there.jsonl: is there already; name another output"):
        strength(recipe(world / "net", world / "chance.jsonl", world / "there"), world / "there.jsonl")
    few = recipe(world / "net", pairs(world / "few.jsonl", 3), world / "few", ensemble={"folds": 4})
    with pytest.raises(UserError, match=r"ensemble.folds: expected at most 3, the number of prompts"):
        strength(few, world / "none.jsonl")

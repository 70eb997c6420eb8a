"""Rows of one scored response: for heads that take responses one by one, and for no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_support import problems, settled, tokenizer, write_jsonl
from test_trainer import logs, run, weights, world  # noqa: F401

from po.data.layout import arrange, check_needs
from po.data.prepare import prepare
from po.data.rows import Example, Item
from po.data.wanted import Wanted, wanted
from po.errors import UserError
from po.heads import HEADS
from po.heads.a_lol_ref_free import ALoLRefFree
from po.heads.dro_v import DROV
from po.heads.infonca import InfoNCA
from po.heads.sft import SFT
from po.spec import DataSpec, Source, Term
from po.types import Head

TOK = tokenizer()
ONE = {"prompt": "q", "responses": [{"content": "a", "reward": 2}]}
TWO = "t.jsonl:1: responses: expected at least two responses, or one with a label, got a list of 1"


def example(data: dict[str, Any], want: Wanted) -> Example:
    kept = settled(data, TOK, wanted=want).example
    assert kept is not None
    return kept


def test_one_response_is_enough_for_heads_that_take_them_one_by_one() -> None:
    for terms in ([Term(DROV())], [Term(ALoLRefFree()), Term(SFT())]):
        assert wanted(terms).single
        one = example(ONE, wanted(terms))
        assert one.reward == (2.0,)
        rows = [
            example({"prompt": "q", "completion": "a", "reward": 2, "value": 1}, wanted(terms)),
            example({**ONE, "value": 1}, wanted(terms)),
        ]
        assert check_needs(terms, rows, "data.train") == "set"
        assert arrange(rows, "set", "best_vs_worst", None, 0) == (
            [Item(0, (0,)), Item(1, (0,))],
            "2 sets of 1 responses",
        )
    assert problems({"prompt": "q", "responses": ["a"]}, Wanted(single=True)) == [
        "t.jsonl:1: responses: expected at least two responses, or one with a reward or a label, got a list of 1"
    ]


def test_of_a_set_one_response_may_remain(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "responses": ["a" * 20, "b" * 20, "c"], "rewards": [1, 2, 3], "value": 0}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    sources = (Source(str(path)),)
    spec = DataSpec(sources, max_length=10, max_dropped=1, cache_dir=str(tmp_path / "cache"))
    (kept,) = prepare(spec, sources, TOK, "k", "train", wanted([Term(ALoLRefFree())])).examples
    assert kept.reward == (3.0,)
    with pytest.raises(UserError, match="no row is left to train on"):
        prepare(spec, sources, TOK, "k", "train", wanted([Term(InfoNCA())]))


@pytest.mark.parametrize("heads", [[InfoNCA()], [DROV(), InfoNCA()]])
def test_and_for_no_others(heads: list[Head]) -> None:
    terms = [Term(h) for h in heads]
    assert not wanted(terms).single
    assert problems(ONE, wanted(terms)) == [TWO]
    row = example({"prompt": "q", "completion": "a", "reward": 2}, wanted(terms))
    with pytest.raises(UserError) as e:
        check_needs(terms, [row], "data.train")
    assert str(e.value) == (
        "data.train: head 'infonca' needs a second response to every prompt; t.jsonl:1 has none. "
        "Add one, or use head 'sft'."
    )
    assert not wanted([Term(SFT())]).single


def test_only_sets_of_responses_are_taken_one_by_one() -> None:
    for name, head in HEADS.items():
        assert not head.needs.single or (head.needs.layout == "set" and head.needs.unit != "group"), name


@pytest.mark.parametrize("head", ["a_lol", "dro_v", "ppo", "reinforce_pp", "sdft"])
def test_training_on_them_is_training_on_the_set(world: Path, head: str) -> None:  # noqa: F811
    """One prompt with three responses, and the same as three rows: the same step."""
    responses = [{"content": f"w{k} w{k + 1}", "reward": float(k), "logps": [-4.0, -4.5, -3.5]} for k in range(3)]
    row = {"prompt": "w5 w6 ", "privileged_prompt": "w7 w5 w6 ", "value": 0.5}
    whole = [{**row, "responses": responses}]
    parts = [{**row, "responses": [r]} for r in responses]
    outs = []
    for name, rows in (("whole", whole), ("parts", parts)):
        path = world / f"{head}-{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = {"train": str(path), "cache_dir": str(world / "cache")}
        train = {"optim": "sgd", "per_device_train_batch_size": 3, "max_steps": 2}
        outs.append(run(world, f"{head}-{name}", loss=[{"head": head}], data=data, train=train))
    assert weights(outs[0]).abs().max() > 1e-4
    assert (weights(outs[0]) - weights(outs[1])).abs().max() < 1e-6
    for a, b in zip(*(logs(out)[:2] for out in outs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)

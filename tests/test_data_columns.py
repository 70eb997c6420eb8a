"""Numbers of responses and of their tokens, under the names that heads declare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from data_support import problems, row, settled, tokenizer, write_jsonl

from po.batch import Collate
from po.data.formats import check_columns
from po.data.groups import Groups
from po.data.layout import check_needs
from po.data.prepare import prepare
from po.data.rows import Example, Item, Other
from po.data.wanted import Wanted, wanted
from po.errors import UserError
from po.spec import DataSpec, Source, Term
from po.types import Head, HeadInput, HeadOutput, Needs

TOK = tokenizer()
P = {"prompt": "q"}


@dataclass(frozen=True)
class Reads(Head):
    needs: ClassVar[Needs] = Needs("pair", response_columns=("gold",), token_columns=("spread",))

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput((x.seg.sum(x.token_column_T("spread")) * x.response_column_GK("gold")).sum(-1))


BOTH = wanted([Term(Reads())])
FORMS: list[dict[str, Any]] = [
    {"chosen": "a", "rejected": "bc", "chosen_gold": 1, "rejected_gold": 0.5}
    | {"chosen_spread": [1, 2], "rejected_spread": [3, 4, 5]},
    {"responses": [{"content": "a", "reward": 2, "gold": 1, "spread": [1, 2]},
                   {"content": "bc", "reward": 1, "gold": 0.5, "spread": [3, 4, 5]}]},
    {"responses": ["a", "bc"], "rewards": [2, 1], "gold": [1, 0.5], "spread": [[1, 2], [3, 4, 5]]},
    {"responses": ["a", "bc"], "rewards": [2, 1], "golds": [1, 0.5], "spreads": [[1, 2], [3, 4, 5]]},
]  # fmt: skip


@pytest.mark.parametrize("data", FORMS)
def test_they_stand_in_objects_and_beside_responses(data: dict[str, Any]) -> None:
    assert Wanted(response_columns=("gold",), token_columns=("spread",)) == BOTH
    example = settled({**P, **data}, TOK, wanted=BOTH).example
    assert example is not None
    assert example.response_columns == (("gold", (1.0, 0.5)),)
    assert example.token_columns == (("spread", ((1.0, 2.0), (3.0, 4.0, 5.0))),)
    unread = settled({**P, **data}, TOK).example
    assert unread is not None
    assert unread.response_columns == unread.token_columns == ()
    assert check_needs([Term(Reads())], [example], "data.train") == "pair"


def test_a_single_response_and_a_column_of_the_row_of_the_same_name() -> None:
    one = row({**P, "completion": "a", "label": True, "gold": 1, "spread": [1, 2]}, BOTH).responses[0]
    assert (dict(one.columns), dict(one.token_columns)) == ({"gold": 1.0}, {"spread": (1.0, 2.0)})
    want = Wanted(columns=("gold",), response_columns=("gold",))
    both = row({**P, "responses": ["a", "b"], "rewards": [1, 2], "gold": 7, "golds": [1, 2]}, want)
    assert dict(both.columns) == {"gold": 7.0}
    assert [r.columns["gold"] for r in both.responses] == [1.0, 2.0]


def test_tokens_are_cut_with_their_numbers_and_dropped_with_their_response() -> None:
    data = {**P, "responses": ["aaaa", "b", "c"], "rewards": [3, 2, 1], "gold": [1, 2, 3]}
    data["spread"] = [[1, 2, 3, 4, 5], [6, 7], [8, 9]]
    cut = settled(data, TOK, 5, overlong="truncate_response", wanted=BOTH).example
    assert cut is not None
    assert cut.token_columns == (("spread", ((1.0, 2.0, 3.0), (6.0, 7.0), (8.0, 9.0))),)
    dropped = settled(data, TOK, 5, wanted=BOTH).example
    assert dropped is not None
    assert (dropped.response_columns, dropped.token_columns) == (
        (("gold", (2.0, 3.0)),),
        (("spread", ((6.0, 7.0), (8.0, 9.0))),),
    )


BAD: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"responses": [{"content": "a", "reward": 2, "gold": 1}, {"content": "b", "reward": 1}]},
        ["responses[1].gold: expected a finite number, as on the row's other responses, got nothing"],
    ),
    (
        {"chosen": "a", "rejected": "b", "chosen_gold": "x", "rejected_gold": True, "chosen_spread": [1, None]},
        [
            "chosen_gold: expected a finite number, got 'x'",
            "chosen_spread[1]: expected a finite number, got null",
            "rejected_gold: expected a finite number, got true",
            "rejected_spread: expected a list of numbers, one per token, as on the row's other responses, got nothing",
        ],
    ),
    (
        {"responses": ["a", "b"], "rewards": [2, 1], "gold": 1, "spreads": [[1, 2]]},
        [
            "gold: expected a list of 2, one per response, got 1",
            "spreads: expected a list of 2, one per response, got a list of 1",
        ],
    ),
    (
        {"completion": "a", "label": True, "spread": 3},
        ["spread: expected a list of numbers, one per token, got 3"],
    ),
]


@pytest.mark.parametrize(("data", "want"), BAD)
def test_bad_columns(data: dict[str, Any], want: list[str]) -> None:
    assert problems({**P, **data}, BOTH) == [f"t.jsonl:1: {line}" for line in want]
    assert problems({**P, **data}) == []


def test_as_many_numbers_as_tokens() -> None:
    out = settled({**P, "completion": "a", "label": True, "gold": 1, "spread": [1]}, TOK, wanted=BOTH)
    assert str(out.problem) == (
        "t.jsonl:1: responses[0].spread: expected 2 numbers, one per token with its end token, got 1"
    )


def test_rows_without_are_refused() -> None:
    bare = Example("a", "t.jsonl:1", (1,), ((2,), (3,)), label=(1, -1), chosen_first=True)
    half = Example("a", "t.jsonl:1", (1,), ((2,), (3,)), label=(1, -1), response_columns=(("gold", (1.0, 2.0)),))
    for example, what, do in (
        (bare, "a number 'gold' of every response", "Add gold: a number to them."),
        (half, "numbers 'spread' of every response's tokens", "Add spread: a list of one number per token to them."),
    ):
        with pytest.raises(UserError) as e:
            check_needs([Term(Reads())], [example], "data.train")
        assert str(e.value) == f"data.train: head 'Reads' needs {what}; t.jsonl:1 has none. {do}"


def test_they_may_be_renamed() -> None:
    for name in ("gold", "golds", "chosen_spread", "rejected_gold"):
        check_columns(Source("t.jsonl", columns={name: "c"}), BOTH)
        with pytest.raises(UserError, match="is no field that po reads"):
            check_columns(Source("t.jsonl", columns={name: "c"}))


def test_prompts_have_none() -> None:
    want = Wanted(response_columns=("gold",), prompts=True)
    said = row({**P, "responses": [{"content": "a", "gold": "yes"}], "gold": 4}, want)
    assert dict(said.responses[0].columns) == {}


def test_they_survive_the_store(tmp_path: Path) -> None:
    rows = [{**P, **form} for form in FORMS]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    sources = (Source(str(path)),)
    spec = DataSpec(sources, cache_dir=str(tmp_path / "cache"))
    got = prepare(spec, sources, TOK, "k", "train", BOTH)
    for e in got.examples:
        assert e.response_columns == (("gold", (1.0, 0.5)),)
        assert e.token_columns == (("spread", ((1.0, 2.0), (3.0, 4.0, 5.0))),)
    assert prepare(spec, sources, TOK, "k", "train").key != got.key


def test_they_reach_heads_in_the_order_of_items() -> None:
    kept = [settled({**P, **form}, TOK, wanted=BOTH).example for form in FORMS[:1]]
    first = kept[0]
    assert first is not None
    one = Example("b", "w", (5,), ((6,),), response_columns=(("gold", (9.0,)),), token_columns=(("spread", ((8.0,),)),))
    groups = Groups([first, one], [Item(0, (1, 0), Other(1, 0, 1)), Item(1, (0,), Other(0, 1, 2))])
    for want, tokens in ((BOTH, 6), (Wanted(response_columns=("gold",), token_columns=("spread",), mismatch=True), 9)):
        batch = Collate(wanted=want)([groups[0, True], groups[1, True]])
        assert batch.stream.target_T.numel() == tokens
        x = batch.head_input(torch.zeros(tokens), None)
        assert x.response_column_GK("gold").tolist() == [[0.5, 1.0], [9.0, 0.0]]
        assert x.token_column_T("spread").tolist() == [3, 4, 5, 1, 2, 8]
    plain = Collate()([groups[0, True]]).head_input(torch.zeros(5), None)
    with pytest.raises(LookupError, match=r'token_columns=\("spread",\)'):
        plain.token_column_T("spread")

"""Pairs from sets by named rules, the layouts, and what heads need from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from po.data.layout import arrange, check_needs
from po.data.rows import Example, Item
from po.errors import UserError
from po.heads import HEADS
from po.spec import Term
from po.types import Head, HeadInput, HeadOutput, Needs


def example(rewards: Any = None, label: Any = None, n: int = 0, salt: int = 0, **facts: Any) -> Example:
    n = n or len(rewards or label)
    ids = tuple((salt, k, 2) for k in range(n))
    return Example("id", "train.jsonl:1", (1, salt), ids, rewards, label, **facts)


SET = example((2.0, 5.0, 5.0, 1.0))
PAIR = example(label=(1, -1), chosen_first=True)


def pairs(e: Example, rule: Any, margin: float | None = None, seed: int = 0) -> list[tuple[int, ...]]:
    return [i.responses for i in arrange([e], "pair", rule, margin, seed)[0]]


@pytest.mark.parametrize(
    ("rule", "margin", "want", "ties"),
    [
        ("best_vs_worst", None, [(1, 3)], 0),
        ("adjacent", None, [(2, 0), (0, 3)], 1),
        ("all", None, [(1, 0), (1, 3), (2, 0), (2, 3), (0, 3)], 1),
        ("margin", 3.0, [(1, 0), (1, 3), (2, 0), (2, 3)], 1),
        ("margin", 3.5, [(1, 3), (2, 3)], 1),
        ("margin", 0.0, [(1, 0), (1, 3), (2, 0), (2, 3), (0, 3)], 1),
    ],
)
def test_a_rule_gives_these_pairs(rule: Any, margin: float | None, want: list[Any], ties: int) -> None:
    items, line = arrange([SET], "pair", rule, margin, 0)
    assert [i.responses for i in items] == want
    closer = "" if margin is None else f", {5 - len(want)} closer than {margin:g}"
    assert line == f"{len(want)} pairs derived from 1 sets by {rule} ({ties} ties{closer} made none)"


def test_random_pairs_depend_on_seed_and_content_and_nothing_else() -> None:
    many = [example((0.0, 1.0, 2.0, 3.0, 9.0), salt=s) for s in range(200)]
    items, _ = arrange(many, "pair", "best_vs_random", None, 7)
    drawn = [i.responses[1] for i in items]
    assert {i.responses[0] for i in items} == {4}
    assert {drawn.count(k) > 25 for k in range(4)} == {True}
    back, _ = arrange(many[::-1], "pair", "best_vs_random", None, 7)
    assert [i.responses[1] for i in back][::-1] == drawn
    assert [i.responses[1] for i in arrange(many, "pair", "best_vs_random", None, 8)[0]] != drawn
    assert {pairs(SET, "best_vs_random", seed=s)[0] for s in range(20)} == {(1, 0), (1, 3)}


def test_ties_and_equal_responses_never_make_a_pair() -> None:
    flat = example((3.0, 3.0))
    for rule in ("best_vs_worst", "best_vs_random", "adjacent", "all"):
        items, line = arrange([flat, SET], "pair", rule, None, 0)  # type: ignore[arg-type]
        assert {i.example for i in items} == {1}
        assert "derived from 2 sets" in line
    twice = Example("id", "w", (1,), ((5, 2), (5, 2)), (1.0, 0.0))
    with pytest.raises(UserError) as e:
        arrange([flat, twice], "pair", "best_vs_worst", None, 0)
    assert str(e.value) == (
        "the data gives nothing to train on: 0 pairs derived from 2 sets by best_vs_worst (2 ties made none). "
        "Choose another data.pairing"
    )


def test_a_pair_by_the_datas_own_word_stays_as_it_is() -> None:
    scored = example((1.0, 1.0), chosen_first=True)
    labelled = example(label=(-1, 1, -1))
    items, line = arrange([PAIR, scored, example(n=2), labelled], "pair", "best_vs_worst", None, 0)
    assert items == [Item(0, (0, 1)), Item(1, (0, 1)), Item(2, (0, 1)), Item(3, (1, 2))]
    assert line == "3 pairs as given; 1 pairs derived from 1 sets by best_vs_worst (0 ties made none)"


def test_the_other_layouts() -> None:
    single = example(label=(-1,))
    assert arrange([SET, PAIR], "set", "all", None, 0) == (
        [Item(0, (0, 1, 2, 3)), Item(1, (0, 1))],
        "2 sets of 2 to 4 responses",
    )
    assert arrange([PAIR, single], "unpaired", "all", None, 0) == (
        [Item(0, (0,)), Item(0, (1,)), Item(1, (0,))],
        "3 labelled responses: 1 desirable, 2 undesirable",
    )
    assert arrange([PAIR, SET, single, example(n=1), example(label=(-1, 1))], "best", "all", None, 0) == (
        [Item(0, (0,)), Item(1, (1,)), Item(3, (0,)), Item(4, (1,))],
        "the best response of 4 rows; 1 undesirable ones left out",
    )
    with pytest.raises(UserError, match=r"^the data gives nothing to train on: the best response of 0 rows; 1 undes"):
        arrange([single], "best", "all", None, 0)


def test_a_margin_and_its_rule_go_together() -> None:
    for margin in (None, -1.0, float("nan")):
        with pytest.raises(
            UserError, match=r"^data.pairing_margin: with pairing: margin, expected the least difference"
        ):
            arrange([SET], "pair", "margin", margin, 0)
    with pytest.raises(UserError) as e:
        arrange([SET], "pair", "all", 1.0, 0)
    assert str(e.value) == ("data.pairing_margin: only pairing: margin reads it; pairing is all. Remove one of them")


@dataclass(frozen=True)
class Unpaired(Head):
    needs: ClassVar[Needs] = Needs("unpaired", unit="response", label=True)

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(torch.zeros(x.seg.valid_GK.shape))


@dataclass(frozen=True)
class Sampled(Unpaired):
    needs: ClassVar[Needs] = Needs("set", behaviour=True)


def terms(*names: str) -> list[Term]:
    return [Term(HEADS[name]()) for name in names]


def refused(loss: list[Term], *examples: Example) -> str:
    with pytest.raises(UserError) as e:
        check_needs(loss, examples, "data.train")
    return str(e.value)


def test_the_layout_of_a_batch_is_what_its_heads_agree_on() -> None:
    assert check_needs(terms("dpo"), [PAIR, SET], "data.train") == "pair"
    assert check_needs(terms("infonca"), [SET], "data.train") == "set"
    assert check_needs(terms("sft"), [SET, PAIR, example(n=1)], "data.train") == "best"
    assert check_needs(terms("sft", "dpo"), [PAIR], "data.train") == "pair"
    assert check_needs([Term(Unpaired())], [example(label=(1,)), PAIR], "data.train") == "unpaired"


def test_what_the_data_lacks_is_said_with_head_need_and_row() -> None:
    single = example(label=(1,))
    assert refused(terms("infonca"), SET, PAIR) == (
        "data.train: head 'infonca' needs a reward on every response; train.jsonl:1 has none. "
        "Score them, or use head 'dpo'."
    )
    assert refused(terms("dpo"), PAIR, single) == (
        "data.train: head 'dpo' needs two responses with a preference; train.jsonl:1 has none. "
        "Give rows chosen and rejected, or scored responses."
    )
    assert refused(terms("infonca"), example((1.0,))) == (
        "data.train: head 'infonca' needs a second response to every prompt; train.jsonl:1 has none. "
        "Add one, or use head 'sft'."
    )
    assert refused([Term(Unpaired())], SET) == (
        "data.train: head 'Unpaired' needs a label on every response; train.jsonl:1 has none. "
        "Add label: true or false to them."
    )
    assert refused([Term(Sampled())], SET) == (
        "data.train: head 'Sampled' needs the sampler's logps of every response; train.jsonl:1 has none. "
        "Sample them again with log-probs."
    )
    two = example((1.0, 0.0), logps=((0.0, 0.0),) * 2)
    assert check_needs(terms("grpo2"), [two], "data.train") == "set"
    assert refused(terms("grpo2"), example((1.0, 0.0, 2.0), logps=((0.0, 0.0),) * 3)) == (
        "data.train: head 'grpo2' needs sets of exactly 2 responses; train.jsonl:1 has none. "
        "Make such sets (data_prep/subset.py), or use a head for any number."
    )
    assert refused(terms("dpo", "infonca"), SET) == (
        "data.train: heads 'dpo' (pair) and 'infonca' (set) want different batches; one recipe trains on one layout"
    )
    assert refused(terms("dpo")) == "data.train: expected at least one loss term and one row"

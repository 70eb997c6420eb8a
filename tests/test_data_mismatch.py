"""Another row's response for every group: whose, how much of it, and that nothing but seed and content decides."""

from __future__ import annotations

from itertools import combinations

import pytest

from po.data.layout import arrange
from po.data.rows import Example, Item
from po.errors import UserError


def example(i: int, responses: int = 1, tokens: int = 2, prompt: tuple[int, ...] | None = None) -> Example:
    ids = tuple((100 * i + k + 1,) * tokens for k in range(responses))
    labels = tuple(1 - 2 * (k % 2) for k in range(responses))
    return Example(f"r{i}", f"t.jsonl:{i}", prompt or (7, i), ids, label=labels)


def given(examples: list[Example], seed: int = 0, layout: str = "unpaired") -> list[Item]:
    return arrange(examples, layout, "best_vs_worst", None, seed, mismatch=True)[0]  # type: ignore[arg-type]


def others(examples: list[Example], seed: int = 0) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
    """By content: the row and response of an item -> the ids that it is given."""
    found = {}
    for item in given(examples, seed):
        e = examples[item.example]
        assert item.other is not None
        other = examples[item.other.example]
        found[e.id, item.responses] = other.response_ids[item.other.response][: item.other.tokens]
    return found


def test_every_row_lends_to_one_row_and_never_to_itself() -> None:
    rows = [example(i) for i in range(50)]
    items = given(rows)
    assert [(i.example, i.responses) for i in items] == [(i, (0,)) for i in range(50)]
    lenders = [i.other.example for i in items if i.other]
    assert sorted(lenders) == list(range(50))
    assert all(a != i.example for a, i in zip(lenders, items, strict=True))


def test_rows_of_one_prompt_do_not_lend_to_each_other() -> None:
    rows = [example(i, prompt=(7, i // 3)) for i in range(12)] + [example(99, responses=3, prompt=(1,))]
    for seed in range(20):
        for item in given(rows, seed):
            assert item.other is not None
            assert rows[item.other.example].prompt_ids != rows[item.example].prompt_ids
    lent = {i.other.response for s in range(20) for i in given(rows, s) if i.other and i.other.example == 12}
    assert lent == {0, 1, 2}


def test_seed_and_content_decide_and_the_order_of_rows_does_not() -> None:
    rows = [example(i, responses=1 + i % 3) for i in range(30)]
    assert others(rows) == others(rows[::-1])
    different = [
        sum(others(rows, a)[k] != others(rows, b)[k] for k in others(rows)) for a, b in combinations(range(4), 2)
    ]
    assert min(different) > 30


@pytest.mark.parametrize("layout", ["pair", "labelled", "best", "set"])
def test_every_layout_can_have_it(layout: str) -> None:
    rows = [example(i, responses=2) for i in range(5)]
    plain, _ = arrange(rows, layout, "best_vs_worst", None, 0)  # type: ignore[arg-type]
    items = given(rows, layout=layout)
    assert [(i.example, i.responses, i.other is None) for i in items] == [(*astuple(i), False) for i in plain]
    lent = {i.other.response for i in items if i.other}
    assert lent <= {k for i in plain for k in i.responses}


def astuple(item: Item) -> tuple[int, tuple[int, ...]]:
    assert item.other is None
    return item.example, item.responses


def test_no_sequence_becomes_longer_than_the_datas_longest() -> None:
    rows = [example(0, tokens=9, prompt=(1,)), example(1, tokens=1, prompt=(2,) * 9), example(2, tokens=1, prompt=(3,))]
    for seed in range(10):
        sizes = [len(rows[i.example].prompt_ids) + i.other.tokens for i in given(rows, seed) if i.other]
        assert max(sizes) <= 10
        assert min(i.other.tokens for i in given(rows, seed) if i.other) == 1


def test_data_of_one_prompt_is_refused() -> None:
    for rows in ([example(0, responses=2)], [example(i, prompt=(7,)) for i in range(3)]):
        with pytest.raises(UserError) as e:
            given(rows)
        assert str(e.value) == (
            f"the data gives no response of another row: its {len(rows)} rows have one prompt. A head of the recipe "
            "compares with responses to other prompts; add rows that have others"
        )

"""Rows that the steps of a preparation write: what po reads back, and nothing that was said is lost."""

from __future__ import annotations

from typing import Any

from po.data.formats import convert
from po.data.read import Record
from po.prep.rows import EVERYTHING, ScoredSet, as_json, read_set
from po.spec import Source

SOURCE = Source("x.jsonl")


def understood(data: dict[str, Any]) -> ScoredSet:
    read = read_set(Record("x.jsonl:1", data), SOURCE)
    assert isinstance(read, ScoredSet), read
    return read


def test_fields_that_would_be_read_as_something_else_move() -> None:
    """A pair's own `score` says nothing of its responses; beside a list of them po would take it for theirs."""
    read = understood({"prompt": "p", "chosen": "a", "rejected": "b", "score": 3, "topic": "t"})
    assert read.fields == {"id": "x.jsonl:1", "prompt": "p", "topic": "t", "original": {"score": 3}}
    again = understood(read.with_answers([{"content": "a", "label": True}, {"content": "b", "label": False}]))
    assert again.rewards == [1.0, -1.0]
    assert again.fields == read.fields


def test_a_field_called_original_stays() -> None:
    assert understood({"prompt": "p", "chosen": "a", "rejected": "b", "original": "of"}).fields["original"] == "of"
    read = understood({"prompt": "p", "chosen": "a", "rejected": "b", "original": "of", "label": True})
    assert read.fields["original"] == {"original": "of", "label": True}


def test_what_is_said_of_a_response_is_kept_whatever_its_list_is_called() -> None:
    data = {"prompt": "p", "completions": [{"response": t, "score": k, "notes": [t]} for k, t in enumerate("ab")]}
    read = understood(data)
    assert read.answers == tuple({"content": t, "reward": float(k), "notes": [t]} for k, t in enumerate("ab"))
    assert read.as_pair(1, 0) | {"id": ""} == {
        **{"id": "", "prompt": "p", "chosen": "b", "rejected": "a"},
        **{"chosen_reward": 1.0, "chosen_notes": ["b"], "rejected_reward": 0.0, "rejected_notes": ["a"]},
    }


def test_both_ways_of_writing_say_the_same() -> None:
    """A row written again as it is, and with its own answers."""
    answers = [{"content": t, "reward": 1, "embedding": [k], "teacher": None, "x": k} for k, t in enumerate("ab")]
    data = {"id": "r", "prompt": "p", "responses": answers}
    row = convert(Record("x:1", data), SOURCE, EVERYTHING).row
    assert row is not None
    read = understood(data)
    assert as_json(row, data) == read.with_answers(read.answers)

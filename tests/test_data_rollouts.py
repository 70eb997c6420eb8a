"""Rollouts as rows: what was sampled is trained on again with the very same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import CHATML, problems, row, settled, tokenizer, user, write_jsonl

from po.data.overlong import Limits, Outcome, settle
from po.data.prepare import prepare
from po.data.show import show
from po.data.tokenize import Encoder
from po.data.wanted import Wanted
from po.errors import UserError
from po.spec import DataSpec, Source

TOK = tokenizer()
SIZE = len(TOK)
IDS = Wanted(logps=True)


def said(*ids: int, **more: Any) -> dict[str, Any]:
    """A response of these ids, not what the tokenizer would make of its text."""
    return {"content": TOK.decode(ids), "token_ids": list(ids), "logps": [-0.5 * i for i in ids], "reward": 1.0, **more}


def rollout(*responses: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"prompt": "q", "prompt_ids": [1, 3, 77], "responses": list(responses), **more}


def test_ids_are_taken_as_they_are() -> None:
    """Special tokens inside, none added at the end; a merge that the tokenizer would not have missed."""
    merging = tokenizer(merges=[("a", "b")])
    a, b, ab = (merging.convert_tokens_to_ids(t) for t in ("a", "b", "ab"))
    group = rollout(said(a, b, 4, sampler="hf"), said(ab, 2, reward=0, ended=True), said(a, reward=0, ended=False))
    example = settled(group, merging, wanted=IDS).example
    assert example is not None
    assert (example.prompt_ids, example.response_ids) == ((1, 3, 77), ((a, b, 4), (ab, 2), (a,)))
    assert example.logps == tuple(tuple(-0.5 * i for i in r) for r in example.response_ids)
    assert (example.reward, example.ended) == ((1.0, 0.0, 0.0), (True, True, False))
    assert row(group, IDS).responses[0].source == "hf"
    assert "a|b|<\\|im_end\\|>" in show(example, merging)
    assert settled(rollout(said(7), said(8)), TOK).example.ended is None  # type: ignore[union-attr]


def test_a_conversation_too() -> None:
    chat = tokenizer(CHATML, bos=False, eos="<|im_end|>")
    group = rollout(said(70, 4), said(71, 72), prompt=[user("q")])
    example = settled(group, chat, wanted=IDS).example
    assert example is not None
    assert example.response_ids == ((70, 4), (71, 72))


def test_a_sampler_may_repeat_itself_and_say_nothing() -> None:
    for group in (rollout(said(70, 2), said(70, 2)), rollout(said(2, content=""), said(2, content="", reward=0.0))):
        out = settled(group, TOK, wanted=IDS)
        assert out.fate == "kept"
        assert out.example is not None
        assert len(out.example.response_ids) == 2


def test_lengths() -> None:
    group = rollout(said(70, 71, 72, 2), said(70, 2), said(73, 2))
    out = settled(group, TOK, 5, wanted=IDS)
    assert out.lines == {"cut": "t.jsonl:1: responses[0] of 4 tokens, room is 2"}
    cut = settled(group, TOK, 5, overlong="truncate_response", wanted=IDS).example
    assert cut is not None
    assert cut.response_ids[0] == (70, 71)
    assert cut.logps is not None
    assert cut.logps[0] == (-35.0, -35.5)
    short = settled(group, TOK, 6, 2, "truncate_prompt", wanted=IDS)
    assert short.lines == {"overlong": "t.jsonl:1: the prompt cannot be cut below 3 tokens, room is 2"}


def test_a_response_that_was_cut_has_no_end_token() -> None:
    data = {"prompt": "q", "responses": [{"content": "ab", "reward": 1, "ended": False}, {"content": "b", "reward": 0}]}
    text = settled(data, TOK).example
    assert text is not None
    assert [TOK.decode(r) for r in text.response_ids] == ["ab", "b</s>"]
    assert text.ended == (False, True)
    chat = tokenizer(CHATML, bos=False, eos="<|im_end|>")
    talk = settled({**data, "prompt": [user("q")]}, chat)
    assert talk.example is not None
    assert [chat.decode(r) for r in talk.example.response_ids] == ["ab", "b<|im_end|>\n"]
    assert (talk.counts["responses_stop"], talk.counts["responses_open"]) == (1, 1)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"prompt": "q", "responses": [said(7), said(8)]},
        ["prompt_ids: expected a list of token ids, as the responses have token_ids, got nothing"],
    ),
    (
        rollout(said(7), {"content": "b", "reward": 1.0, "logps": [-1.0]}),
        ["responses[1].token_ids: expected token ids, as on the row's other responses, got nothing"],
    ),
    (
        rollout(said(7, token_ids=[]), said(8, token_ids=[7, -1]), prompt_ids="x"),
        [
            "responses[0].token_ids: expected a list of token ids, got an empty list",
            "responses[1].token_ids[1]: expected a token id, got -1",
            "prompt_ids: expected a list of token ids, got 'x'",
        ],
    ),
    (
        rollout(said(7, token_ids=[True]), said(8, ended="no"), tokenizer=5),
        [
            "responses[0].token_ids[0]: expected a token id, got true",
            "responses[1].ended: expected true or false, got 'no'",
            "tokenizer: expected text, the key of a tokenizer, got 5",
        ],
    ),
]


@pytest.mark.parametrize(("data", "want"), BAD)
def test_bad_rollouts(data: dict[str, Any], want: list[str]) -> None:
    assert problems(data, IDS) == [f"t.jsonl:1: {line}" for line in want]


def under(key: str | None, data: dict[str, Any]) -> Outcome:
    return settle(row(data, IDS), Encoder(TOK, key), Limits(100, None, "drop"))


def test_ids_of_another_tokenizer_or_beyond_the_vocabulary() -> None:
    group = rollout(said(7), said(8), tokenizer="a" * 64)
    assert under("a" * 64, group).fate == under(None, group).fate == under("b" * 64, rollout(said(7), said(8))).fate
    assert str(under("b" * 64, group).problem) == (
        "t.jsonl:1: tokenizer: expected bbbbbbbbbbbb, the key of this run's tokenizer (the row's token ids are of "
        "another), got aaaaaaaaaaaa"
    )
    assert str(under(None, rollout(said(7), said(8, token_ids=[8, SIZE], logps=[-1, -1]))).problem) == (
        f"t.jsonl:1: responses[1].token_ids[1]: expected an id below {SIZE}, the size of the vocabulary, got {SIZE}"
    )
    assert str(under(None, rollout(said(7), said(8), prompt_ids=[SIZE])).problem) == (
        f"t.jsonl:1: prompt_ids[0]: expected an id below {SIZE}, the size of the vocabulary, got {SIZE}"
    )
    assert str(under(None, rollout(said(7), said(8, logps=[-1, -1]))).problem) == (
        "t.jsonl:1: responses[1].logps: expected 1 numbers, one per token with its end token, got 2"
    )


def test_ids_without_sampled_responses_are_a_column_like_any_other() -> None:
    text = {"prompt": "q", "chosen": "a", "rejected": "b", "prompt_ids": [5], "tokenizer": "x"}
    assert row(text).prompt_ids is None
    assert row(text).meta == {"prompt_ids": [5], "tokenizer": "x"}


def test_rollouts_survive_the_store(tmp_path: Path) -> None:
    rows = [rollout(said(70 + i, 2), said(71 + i, ended=False), tokenizer="key") for i in range(3)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    sources = (Source(str(path)),)
    spec = DataSpec(sources, cache_dir=str(tmp_path / "cache"))
    got = prepare(spec, sources, TOK, "key", "train", IDS)
    for i, e in enumerate(got.examples):
        assert (e.prompt_ids, e.response_ids) == ((1, 3, 77), ((70 + i, 2), (71 + i,)))
        assert e.logps == ((-0.5 * (70 + i), -1.0), (-0.5 * (71 + i),))
        assert e.ended == (True, False)
    assert got.report.warnings == ()
    with pytest.raises(UserError, match="3 of 3 rows are bad"):
        prepare(spec, sources, TOK, "other", "train", IDS)

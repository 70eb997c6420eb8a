"""One length policy: what is dropped or cut, what it never does, and what it says. Tokens here are bytes."""

from __future__ import annotations

from typing import Any

import pytest
from data_support import CHATML, assistant, settled, tokenizer, user

from po.data.overlong import Outcome

TOK = tokenizer()  # <s>, one token per byte, </s>
EOS = 2


def pair(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
    """A pair whose prompt and responses have so many bytes: one token more each, for BOS or EOS."""
    return {"prompt": "p" * prompt, "chosen": "c" * chosen, "rejected": "r" * rejected}


def scored(prompt: int, *lengths: int) -> dict[str, Any]:
    return {
        "prompt": "p" * prompt,
        "responses": ["abcdefgh"[k] * n for k, n in enumerate(lengths)],
        "rewards": [*range(len(lengths))],
    }


def sizes(out: Outcome) -> tuple[int, list[int]]:
    assert out.example is not None
    return len(out.example.prompt_ids), [len(r) for r in out.example.response_ids]


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt", "truncate_response"])
def test_what_fits_is_left_alone(policy: str) -> None:
    out = settled(pair(4, 4, 2), TOK, 10, 5, policy)
    assert (out.fate, sizes(out), out.lines, out.length) == ("kept", (5, [5, 3]), {}, 10)


def test_drop_takes_whole_pairs_and_single_responses_of_sets() -> None:
    out = settled(pair(4, 5, 2), TOK, 10)
    assert (out.fate, out.lines) == ("overlong", {"overlong": "t.jsonl:1: responses[0] of 6 tokens, room is 5"})
    out = settled(scored(4, 2, 9, 3, 8), TOK, 10)
    assert (out.fate, sizes(out)) == ("kept", (5, [3, 4]))
    assert out.example is not None
    assert out.example.reward == (0, 2)
    assert out.counts["responses_overlong"] == 2
    assert out.lines == {"cut": "t.jsonl:1: responses[1, 3] of 9 to 10 tokens, room is 5"}
    out = settled(scored(4, 2, 9, 8), TOK, 10)
    assert (out.fate, out.counts["responses_overlong"]) == ("overlong", 0)
    named = settled({**pair(4, 5, 2), "score_chosen": 1, "score_rejected": 0}, TOK, 10)
    assert named.fate == "overlong"


@pytest.mark.parametrize("policy", ["drop", "truncate_response"])
def test_a_prompt_without_room_drops_the_row(policy: str) -> None:
    out = settled(pair(9, 1, 2), TOK, 10, None, policy)
    assert (out.fate, out.lines) == ("overlong", {"overlong": "t.jsonl:1: the prompt has 10 tokens, room is 9"})
    assert settled(pair(6, 1, 2), TOK, 10, 6, policy).fate == "overlong"


def test_a_cut_response_keeps_its_beginning_and_has_no_eos() -> None:
    out = settled(pair(4, 9, 2), TOK, 10, None, "truncate_response")
    assert (out.fate, sizes(out)) == ("kept", (5, [5, 3]))
    assert out.example is not None
    assert [r[-1] == EOS for r in out.example.response_ids] == [False, True]
    assert out.lines == {"cut": "t.jsonl:1: responses[0] of 10 tokens, cut to 5"}
    assert (out.counts["responses_cut"], out.counts["responses_stop"], out.counts["responses_kept"]) == (1, 1, 2)
    shortest = settled(pair(8, 9, 9), TOK, 10, None, "truncate_response")
    assert sizes(shortest) == (9, [1, 1])


def test_responses_that_cutting_made_identical_go_and_honest_repetitions_stay() -> None:
    same = {"prompt": "pp", "chosen": "same then a", "rejected": "same then b"}
    cut = "responses[0, 1] of 12 tokens, cut to 6"
    out = settled(same, TOK, 9, None, "truncate_response")
    assert (out.fate, out.lines) == (
        "identical",
        {"identical": f"t.jsonl:1: {cut}; responses[1] became identical to responses[0]"},
    )
    texts = ["same then a", "same then b", "other", "other"]
    out = settled({"prompt": "pp", "responses": texts, "rewards": [1, 2, 3, 4]}, TOK, 9, None, "truncate_response")
    assert out.example is not None
    assert out.example.reward == (1, 3, 4)
    assert out.counts["responses_identical"] == 1


def test_a_prompt_is_cut_from_the_left_behind_bos() -> None:
    data = {"prompt": "0123456789", "chosen": "cccc", "rejected": "r"}
    out = settled(data, TOK, 10, None, "truncate_prompt")
    assert out.example is not None
    assert TOK.decode(list(out.example.prompt_ids)) == "<s>6789"
    assert sizes(out) == (5, [5, 2])
    assert out.lines == {"cut": "t.jsonl:1: prompt cut from 11 to 5 tokens"}
    only = settled(data, TOK, 100, 3, "truncate_prompt")
    assert sizes(only) == (3, [5, 2])


def test_a_response_that_no_prompt_leaves_room_for_goes_as_under_drop() -> None:
    assert settled(pair(4, 8, 2), TOK, 10, None, "truncate_prompt").fate == "overlong"
    out = settled(scored(9, 2, 20, 3), TOK, 10, None, "truncate_prompt")
    assert (sizes(out), out.counts["responses_overlong"], out.counts["prompts_cut"]) == ((6, [3, 4]), 1, 1)


def conversation(*turns: str) -> dict[str, Any]:
    """A system message, then user and assistant turns; the last is the user's."""
    talk = [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(turns)]
    return {"prompt": [{"role": "system", "content": "sys"}, *talk], "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(("room", "first"), [(500, "one"), (90, "two"), (60, "three")])
def test_a_conversation_loses_its_oldest_turns_and_keeps_system_and_header(room: int, first: str) -> None:
    tok = tokenizer(CHATML)
    data = conversation("one" * 5, "answer" * 5, "two" * 5, "answer", "three")
    out = settled(data, tok, room, None, "truncate_prompt")
    assert out.example is not None, out.lines
    prompt = tok.decode(list(out.example.prompt_ids))
    head = "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\n"
    assert prompt.startswith(head + first)
    assert prompt.endswith("three<|im_end|>\n<|im_start|>assistant\n")
    assert sum(sizes(out)[1]) == len(b"yesno") + 2 * 2
    assert sizes(out)[0] + max(sizes(out)[1]) <= room


def test_the_last_turn_is_never_cut() -> None:
    tok = tokenizer(CHATML)
    out = settled(conversation("one", "answer", "three" * 9), tok, 60, None, "truncate_prompt")
    assert (out.fate, out.lines) == (
        "overlong",
        {"overlong": "t.jsonl:1: the prompt cannot be cut below 77 tokens, room is 59"},
    )


def test_an_empty_response_drops_the_row() -> None:
    out = settled({"prompt": "p", "chosen": "</s>", "rejected": "r"}, TOK)
    assert (out.fate, out.lines) == ("empty", {"empty": "t.jsonl:1: responses[0] has no tokens"})


@pytest.mark.parametrize("policy", ["truncate_prompt", "truncate_response"])
def test_logps_are_cut_with_their_tokens(policy: str) -> None:
    data = scored(4, 3, 9)
    data["responses"] = [{"text": t, "logps": [-float(i) for i in range(len(t) + 1)]} for t in data["responses"]]
    out = settled(data, TOK, 10, None, policy)
    if policy == "truncate_response":
        assert out.example is not None
        assert out.example.logps is not None
        assert [len(x) for x in out.example.logps] == sizes(out)[1] == [4, 5]
        assert out.example.logps[1] == (-0.0, -1, -2, -3, -4)
    else:
        assert out.fate == "overlong"

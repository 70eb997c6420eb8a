"""A prompt that knows more: read in the form of the row's prompt, with the same response tokens behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from data_support import CHATML, problems, row, settled, tokenizer, user, write_jsonl

from po.data.groups import Groups
from po.data.layout import check_needs
from po.data.prepare import prepare
from po.data.rows import Example, Item
from po.data.wanted import Wanted, wanted
from po.errors import UserError
from po.spec import DataSpec, Source, Term
from po.types import Head, HeadInput, HeadOutput, Needs

TOK = tokenizer()
CHAT = tokenizer(CHATML, bos=False, eos="<|im_end|>")
KNOWS = Wanted(privileged=True)
SYSTEM = {"role": "system", "content": "s"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOK(text)["input_ids"])


def rendered(*messages: dict[str, str]) -> tuple[int, ...]:
    return tuple(CHAT.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def kept(data: dict[str, Any], tok: Any = TOK, want: Wanted = KNOWS, **options: Any) -> Example:
    example = settled(data, tok, wanted=want, **options).example
    assert example is not None
    return example


def test_it_is_tokenized_as_the_prompt_is() -> None:
    example = kept({**PAIR, "privileged_prompt": "q, and a hint"})
    assert (example.prompt_ids, example.privileged_ids) == (ids("q"), ids("q, and a hint"))
    assert example.response_ids == kept(PAIR).response_ids
    talk = {"prompt": [SYSTEM, user("q")], "chosen": "a", "rejected": "b", "privileged_prompt": [user("q"), user("h")]}
    assert kept(talk, CHAT).privileged_ids == rendered(user("q"), user("h"))
    assert row({**PAIR, "privileged_prompt": "h"}).privileged is None
    assert kept(PAIR).privileged_ids is None


def test_a_text_prompt_that_became_a_conversation() -> None:
    data = {**PAIR, "system": "s", "history": [["x", "y"]], "privileged_prompt": "q and h"}
    said = row(data, KNOWS)
    assert said.privileged == (*said.prompt[:-1], user("q and h"))
    data = {**PAIR, "prompt": [user("q")], "system": "s", "privileged_prompt": [user("h")]}
    assert kept(data, CHAT).privileged_ids == rendered(SYSTEM, user("h"))
    implicit = {"prompt": "q", "privileged_prompt": "h"} | {
        side: [user("q"), {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    assert kept(implicit, CHAT).privileged_ids == rendered(user("h"))


def test_rollouts_and_prompts_have_it_too() -> None:
    responses = [{"content": "a", "reward": k, "token_ids": [70 + k, 2]} for k in range(2)]
    data = {"prompt": "q", "prompt_ids": [1, 77], "responses": responses, "privileged_prompt": "h"}
    assert kept(data).privileged_ids == ids("h")
    assert kept(data).response_ids == ((70, 2), (71, 2))
    online = Wanted(privileged=True, prompts=True)
    assert kept({"prompt": "q", "privileged_prompt": "h"}, want=online).privileged_ids == ids("h")
    long = settled({"prompt": "q", "privileged_prompt": "h" * 9}, TOK, 50, 9, wanted=online)
    assert long.lines == {"overlong": "t.jsonl:1: the privileged prompt has 10 tokens, room is 9"}
    own = settled({"prompt": "q", "completion": "a" * 9, "privileged_prompt": "h" * 9}, TOK, 15, 10, wanted=online)
    assert (own.fate, own.counts["responses_overlong"]) == ("kept", 1)


BAD: list[tuple[dict[str, Any], str]] = [
    ({**PAIR, "privileged_prompt": [user("h")]}, "expected text, as the prompt is, got a list of 1"),
    ({**PAIR, "prompt": [user("q")], "privileged_prompt": "h"}, "expected messages, as the prompt is, got 'h'"),
    ({**PAIR, "privileged_prompt": " "}, "expected text that is not empty, got ' '"),
    ({**PAIR, "prompt": [user("q")], "privileged_prompt": 3}, "expected a list of messages, got 3"),
]


@pytest.mark.parametrize(("data", "want"), BAD)
def test_bad_ones(data: dict[str, Any], want: str) -> None:
    assert problems(data, KNOWS) == [f"t.jsonl:1: privileged_prompt: {want}"]
    assert problems(data) == []


def test_another_boundary_is_a_bad_row() -> None:
    """'=4' is one token, so behind 'h' the response has others than behind '2+2='."""
    merging = tokenizer(merges=[("=", "4")])
    data = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "privileged_prompt": "h"}
    out = settled(data, merging, wanted=KNOWS)
    assert str(out.problem) == (
        "t.jsonl:1: privileged_prompt: expected a prompt after which responses[0] has the same tokens, "
        "got '4</s>' instead of '=4</s>'"
    )
    same = kept({**data, "privileged_prompt": "h, 2+2="}, merging)
    assert same.privileged_ids == tuple(merging("h, 2+2")["input_ids"])


def test_responses_fit_behind_it_and_it_is_never_cut() -> None:
    data = {"prompt": "q", "responses": ["a" * 5, "b" * 3, "c" * 2], "rewards": [1, 2, 3], "privileged_prompt": "h" * 5}
    out = settled(data, TOK, 10, wanted=KNOWS)
    assert (out.length, out.lines) == (12, {"cut": "t.jsonl:1: responses[0] of 6 tokens, room is 4"})
    cut = kept(data, max_length=10, overlong="truncate_response")
    assert [len(r) for r in cut.response_ids] == [4, 4, 3]
    assert settled(data, TOK, 6, overlong="truncate_response", wanted=KNOWS).lines == {
        "overlong": "t.jsonl:1: responses[0] of 6 tokens, cut to 4; the privileged prompt has 6 tokens, room is 5"
    }
    item = [Item(0, (0, 2))]
    assert Groups([cut], item).sizes() == [(2 + 4 + 3) + (6 + 4 + 3)]


@dataclass(frozen=True)
class Knowing(Head):
    needs: ClassVar[Needs] = Needs("pair", privileged=True)

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.seg.sum(x.privileged_T)[:, 0])


@dataclass(frozen=True)
class Elsewhere(Knowing):
    needs: ClassVar[Needs] = Needs("pair", mismatch=True)


def test_rows_without_one_are_refused() -> None:
    with pytest.raises(UserError) as e:
        check_needs([Term(Knowing())], [kept(PAIR)], "data.train")
    assert str(e.value) == (
        "data.train: head 'Knowing' needs a privileged prompt; t.jsonl:1 has none. "
        "Add privileged_prompt to the rows: text, or messages where the prompt is."
    )
    assert check_needs([Term(Knowing())], [kept({**PAIR, "privileged_prompt": "h"})], "data.train") == "pair"


def test_not_together_with_a_mismatch() -> None:
    assert wanted([Term(Knowing())]) == KNOWS
    with pytest.raises(UserError) as e:
        wanted([Term(Knowing()), Term(Elsewhere())])
    assert str(e.value) == (
        "loss: head 'Elsewhere' compares with responses to other prompts and head 'Knowing' with the same ones after a "
        "privileged prompt; one recipe can have one of them"
    )


def test_it_survives_the_store(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{**PAIR, "privileged_prompt": f"h{i}"} for i in range(2)] + [PAIR])
    sources = (Source(str(path)),)
    spec = DataSpec(sources, cache_dir=str(tmp_path / "cache"))
    got = prepare(spec, sources, TOK, "k", "train", KNOWS)
    assert [e.privileged_ids for e in got.examples] == [ids("h0"), ids("h1"), None]
    assert prepare(spec, sources, TOK, "k", "train").key != got.key

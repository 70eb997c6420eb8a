"""Prompts for a sampler: a prompt is enough, the row's own responses stay, every field reaches the rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_support import CHATML, NO_STOP, assistant, problems, row, settled, tokenizer, user, write_jsonl

from po.data.prepare import Prepared, prepare
from po.data.rows import Example
from po.data.store import light
from po.data.wanted import Wanted
from po.errors import UserError
from po.spec import DataSpec, Source

TOK = tokenizer()
CHAT = tokenizer(CHATML, bos=False, eos="<|im_end|>")
ONLINE = Wanted(prompts=True)


def kept(data: dict[str, Any], tok: Any = TOK, **options: Any) -> Example:
    example = settled(data, tok, wanted=ONLINE, **options).example
    assert example is not None
    return example


def record(data: dict[str, Any], **source: Any) -> dict[str, Any]:
    said = row(data, ONLINE, **source).record
    assert said is not None
    return json.loads(said)  # type: ignore[no-any-return]


def test_a_prompt_is_enough() -> None:
    example = kept({"prompt": "2+2="})
    assert (example.prompt_ids, example.response_ids) == (tuple(TOK("2+2=")["input_ids"]), ())
    assert (example.reward, example.label, example.logps, example.is_pair) == (None, None, None, False)
    messages = [{"role": "system", "content": "s"}, user("q")]
    want = tuple(CHAT.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    for data in ({"prompt": messages}, {"messages": messages}, {"prompt": "q", "system": "s"}):
        assert kept(data, CHAT).prompt_ids == want
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert row({"prompt": [user("q")], "tools": tools}, ONLINE).tools == tuple(tools)


def test_every_field_reaches_the_rewards() -> None:
    data = {"prompt": "q", "answer": 42, "label": "cat", "score": [1, "x"], "completions": 5, "deep": {"a": [None]}}
    assert record(data) == data
    assert row(data, ONLINE).responses == ()
    assert record({"ask": "q", "key": "4"}, columns={"prompt": "ask", "solution": "key"}) == {
        "ask": "q", "key": "4", "prompt": "q", "solution": "4"}  # fmt: skip
    assert record({"prompt": "q", "system": "s", "x": 1})["prompt"] == [{"role": "system", "content": "s"}, user("q")]
    assert kept(data).record == row(data, ONLINE).record
    assert row({"prompt": "q", "completion": "a"}).record is None


def test_own_responses_stay_with_their_rewards_and_labels() -> None:
    text = (*TOK("a", add_special_tokens=False)["input_ids"], 2)
    for name in ("completion", "response", "output"):
        assert kept({"prompt": "q", name: "a"}).response_ids == (text,)
    assert kept({"prompt": "q", "completion": "a", "label": True}).label == (1,)
    assert kept({"prompt": "q", "completion": "a", "label": "cat"}).label is None
    assert kept({"prompt": "q", "completion": "a", "score": 2}).reward == (2.0,)
    beside = kept({"prompt": "q", "responses": ["a", "b"], "rewards": [1, 0]})
    inside = kept({"prompt": "q", "responses": [{"content": "a", "reward": 1}, {"content": "b", "reward": 0}]})
    assert beside.reward == inside.reward == (1.0, 0.0)
    for rewards in ([1], [1, "x"], [1, float("nan")], [True, False]):
        assert kept({"prompt": "q", "responses": ["a", "b"], "rewards": rewards}).reward is None
    two = kept({"prompt": "q", "responses": ["a", "a"]})
    assert (len(two.response_ids), two.is_pair, two.label) == (2, False, None)
    pair = kept({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "high"})
    assert (pair.is_pair, pair.label) == (True, (1, -1))
    talk = kept({"messages": [user("q"), assistant("a")]}, CHAT)
    assert CHAT.decode(talk.response_ids[0]) == "a<|im_end|>\n"
    assert kept({"prompt": "q", "chosen": None, "rejected": None}).response_ids == ()


def test_responses_follow_exactly_the_prompts_tokens() -> None:
    merging = tokenizer(merges=[("=", "4")])
    out = settled({"prompt": "2+2=", "responses": ["4", "5"]}, merging, wanted=ONLINE)
    assert out.example is not None
    assert out.example.prompt_ids == tuple(merging("2+2=")["input_ids"])
    assert [merging.decode(r) for r in out.example.response_ids] == ["5</s>"]
    assert (out.lines, out.counts["apart"]) == ({"apart": "t.jsonl:1: responses[0]"}, 1)
    header = tokenizer(NO_STOP)
    assert kept({"prompt": [user("q")], "completion": "a"}, header).response_ids != ()
    think = settled(
        {"prompt": [user("q")], "completion": "a", "chat_template_kwargs": {"think": True}}, CHAT, wanted=ONLINE
    )
    assert think.example is not None
    assert CHAT.decode(think.example.prompt_ids).endswith("<think>\n")
    assert think.lines == {"apart": "t.jsonl:1: responses[0]"}


def test_length_is_the_prompts() -> None:
    long = {"prompt": "p" * 9, "responses": ["a" * 30, "b"]}
    assert settled(long, TOK, 40, 9, wanted=ONLINE).lines == {
        "overlong": "t.jsonl:1: the prompt has 10 tokens, room is 9"
    }
    out = settled(long, TOK, 40, 10, wanted=ONLINE)
    assert (out.fate, out.lines, out.counts["responses_overlong"]) == ("kept", {}, 1)
    assert out.example is not None
    assert [len(r) for r in out.example.response_ids] == [2]
    cut = settled(long, TOK, 20, 6, "truncate_prompt", wanted=ONLINE)
    assert cut.example is not None
    assert cut.example.prompt_ids == (1, *TOK("p" * 5, add_special_tokens=False)["input_ids"])
    assert cut.lines == {"cut": "t.jsonl:1: prompt cut from 10 to 6 tokens"}
    assert cut.example.record is not None
    assert json.loads(cut.example.record)["prompt"] == "p" * 9
    talk = {"prompt": [user("one"), assistant("two"), user("three")]}
    short = kept(talk, CHAT, max_length=60, prompt=40, overlong="truncate_prompt")
    assert CHAT.decode(short.prompt_ids) == "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"answer": "a"}, "prompt: expected text or messages, got nothing"),
    ({"prompt": None}, "prompt: expected text or messages, got null"),
    ({"prompt": " "}, "prompt: expected text that is not empty, got ' '"),
    (
        {"prompt": [user("q"), assistant("a")]},
        "prompt[1].role: expected the prompt's last message from user, tool or system, got 'assistant'",
    ),
    ({"prompt": "q", "chosen": "a"}, "rejected: expected text or messages, got nothing"),
    (
        {"prompt": "q", "responses": [{"content": "a", "reward": "x"}]},
        "responses[0].reward: expected a finite number, got 'x'",
    ),
]


@pytest.mark.parametrize(("data", "want"), BAD)
def test_bad_prompts(data: dict[str, Any], want: str) -> None:
    assert problems(data, ONLINE) == [f"t.jsonl:1: {want}"]


def test_an_answer_alone_is_no_response() -> None:
    assert kept({"question": "q", "answer": "a"}).response_ids == ()


def run(path: Path, want: Wanted, **options: Any) -> Prepared:
    sources = (Source(str(path)),)
    spec = DataSpec(sources, cache_dir=str(path.parent / "cache"), **options)
    return prepare(spec, sources, TOK, "k", "train", want)


def test_prompts_survive_the_store(tmp_path: Path) -> None:
    data = [{"prompt": f"q{i}", "answer": i, "name": "\u00e9\ud800"} for i in range(3)]
    path = write_jsonl(tmp_path / "t.jsonl", [*data, {"prompt": "q", "completion": "a"}, {"answer": 1}])
    got = run(path, ONLINE, max_bad=1)
    assert [json.loads(e.record or "") for e in got.examples][:3] == data
    assert [len(e.response_ids) for e in got.examples] == [0, 0, 0, 1]
    assert (light(got.examples)[0].record, light(got.examples)[0].prompt_ids) == ("", got.examples[0].prompt_ids)
    assert got.report.formats == {"prompt": 5}
    assert not [line for line in got.report.warnings if "nothing reads" in line]
    assert got.report.counts["bad"] == 1
    with pytest.raises(UserError, match="4 of 5 rows are bad"):
        run(path, Wanted(), max_bad=1)
    assert run(path, ONLINE, max_bad=1, max_prompt_length=9).key != got.key

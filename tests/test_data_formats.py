"""Every format that the field writes becomes the same Row; every way to be wrong has its own exact words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_support import ALPACA, assistant, problems, row, user

from po.data.formats import check_columns, convert
from po.data.read import Record
from po.data.rows import Row
from po.data.sources import open_sources
from po.data.wanted import Wanted
from po.errors import UserError
from po.spec import Source

HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {}\n\nAssistant:"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
ANSWER = {"role": "tool", "name": "f", "content": "4"}


def facts(r: Row) -> tuple[Any, ...]:
    """(kind, prompt, contents), messages as (role, content)."""

    def plain(c: Any) -> Any:
        return c if isinstance(c, str) else tuple((m["role"], m["content"]) for m in c)

    return r.kind, plain(r.prompt), [plain(x.content) for x in r.responses]


TALK = (("user", "q"),)
BOTH = [(("assistant", "a"),), (("assistant", "b"),)]
MS = [user("q"), assistant("a")]
PAIRS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "preference, standard": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("pair", "q", ["a", "b"])),
    "preference, conversational": (
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ("pair", TALK, BOTH),
    ),
    "preference, implicit prompt": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        ("pair", TALK, BOTH),
    ),
    "preference, rewards, implicit prompt": (  # ultrafeedback_binarized
        {
            "prompt": "q",
            "messages": MS,
            "chosen": MS,
            "rejected": [user("q"), assistant("b")],
            "score_chosen": 8.0,
            "score_rejected": 7,
        },
        ("set", TALK, BOTH),
    ),
    "preference, HH-RLHF strings": (
        {"chosen": HH.format("q") + " a", "rejected": HH.format("q") + " b"},
        ("pair", HH.format("q"), [" a", " b"]),
    ),
    "preference, alpaca, standard": (
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"},
        ("pair", "q\nx", ["a", "b"]),
    ),
    "preference, alpaca, conversational": (
        {"instruction": "q", "input": "", "system": "s", "history": [["h", "g"]], "chosen": "a", "rejected": "b"},
        ("pair", (("system", "s"), ("user", "h"), ("assistant", "g"), *TALK), BOTH),
    ),
    "preference, sharegpt, conversational": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ("pair", TALK, BOTH),
    ),
    "preference, ms-swift": ({"messages": MS, "rejected_response": "b"}, ("pair", TALK, BOTH)),
    "preference, ms-swift, implicit prompt": (
        {"messages": MS, "rejected_messages": [user("q"), assistant("b")]},
        ("pair", TALK, BOTH),
    ),
    "preference, axolotl, standard": (
        {"question": "q", "chosen_response": "a", "rejected_response": "b"},
        ("pair", "q", ["a", "b"]),
    ),
    "unpaired, TRL": ({"prompt": "q", "completion": "a", "label": True}, ("unpaired", "q", ["a"])),
    "unpaired, LLaMA-Factory": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
        ("unpaired", TALK, BOTH[:1]),
    ),
    "unpaired, ms-swift": ({"messages": MS, "label": 1}, ("unpaired", TALK, BOTH[:1])),
    "demonstration, text": ({"instruction": "q", "output": "a"}, ("demonstration", "q", ["a"])),
    "demonstration, messages": ({"messages": MS}, ("demonstration", TALK, BOTH[:1])),
    "set, texts": ({"query": "q", "answers": ["a", "b"], "rewards": [1, 2]}, ("set", "q", ["a", "b"])),
    "set, messages": (
        {"prompt": [user("q")], "completions": [[assistant("a")], assistant("b")], "scores": [1, 2]},
        ("set", TALK, BOTH),
    ),
    "set, objects": (
        {"prompt": [user("q")], "responses": [{"content": "a", "reward": 1}, {"text": [assistant("b")], "score": 2}]},
        ("set", TALK, BOTH),
    ),
    "set, NeMo": (
        {
            "context": [user("q")],
            "completions": [
                {"rank": 1, "completion": [assistant("a")], "reward": 1},
                {"rank": 0, "completion": [assistant("b")], "reward": 2},
            ],
        },
        ("set", TALK, BOTH),
    ),
    "set, UltraFeedback": (
        {
            "instruction": "q",
            "completions": [
                {"model": "m", "response": "a", "annotations": {"overall_score": 1}},
                {"model": "n", "response": "b", "overall_score": 2},
            ],
        },
        ("set", "q", ["a", "b"]),
    ),
    "labelled set": (
        {"prompt": "q", "responses": [{"answer": "a", "label": False}, {"answer": "b", "label": True}]},
        ("unpaired", "q", ["a", "b"]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_format(name: str) -> None:
    data, want = PAIRS[name]
    got = row(data)
    assert facts(got) == want
    if name.startswith("preference"):
        assert convert(Record("x", data), Source("x")).format == name
        assert got.is_pair
    if name.startswith("set"):
        assert [r.reward for r in got.responses] == [1, 2]
        assert not got.is_pair


def test_labels_and_scores_of_pairs_come_through() -> None:
    assert [r.label for r in row(PAIRS["labelled set"][0]).responses] == [-1, 1]
    assert [row({"prompt": "q", "completion": "a", "label": x}).responses[0].label for x in (True, 1, 0, -1)] == [
        1,
        1,
        -1,
        -1,
    ]
    for a, b in (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
    ):
        got = row({"prompt": "q", "chosen": "a", "rejected": "b", a: 2, b: 3.5})
        assert ([r.reward for r in got.responses], got.is_pair) == ([2, 3.5], True)


@pytest.mark.parametrize(("order", "rewards"), [("lower_is_better", [-1, -3, -2]), ("higher_is_better", [1, 3, 2])])
def test_ranks_become_rewards_in_the_stated_direction(order: Any, rewards: list[float]) -> None:
    answers = [{"answer": t, "rank": r, "model": "m"} for t, r in zip("abc", (1, 3, 2))]
    for data in ({"prompt": "q", "answers": answers}, {"prompt": "q", "answers": ["a", "b", "c"], "ranks": [1, 3, 2]}):
        assert [r.reward for r in row(data, rank_order=order).responses] == rewards
    assert row({"prompt": "q", "answers": answers}, rank_order=order).responses[0].source == "m"


def test_an_implicit_prompt_is_shared_messages_and_never_shared_characters() -> None:
    assert problems({"chosen": "The sky is blue.", "rejected": "The sky is black."}) == [
        "t.jsonl:1: prompt: expected a prompt field (or `separator` in the recipe's source, which ends the prompt in "
        "plain strings), got nothing"
    ]
    both = {"chosen": "Q: x A: y", "rejected": "Q: x A: z"}
    got = row(both, separator=" A:")
    assert (got.prompt, [r.content for r in got.responses]) == ("Q: x A:", [" y", " z"])
    assert problems({"chosen": "Q: x A: y", "rejected": "Q: w A: z"}, separator=" A:") == [
        "t.jsonl:1: prompt: expected the separator ' A:' in a shared beginning, got nothing"
    ]


def test_hh_strings_split_at_the_last_shared_assistant_turn() -> None:
    longer = HH.format("q") + " a\n\nHuman: more\n\nAssistant: c"
    got = row({"chosen": longer, "rejected": HH.format("q") + " b"})
    assert got.prompt == HH.format("q")
    assert [r.content for r in got.responses] == [" a\n\nHuman: more\n\nAssistant: c", " b"]


def test_tool_calls_stay_in_the_response_and_a_prompt_never_ends_with_the_assistant() -> None:
    shared = [user("q"), CALL]
    data = {
        "tools": json.dumps([TOOL]),
        "chosen": [*shared, ANSWER, assistant("a")],
        "rejected": [*shared, ANSWER, assistant("b")],
    }
    got = row(data)
    assert facts(got)[1] == (("user", "q"), ("assistant", ""), ("tool", "4"))
    assert got.tools == (TOOL,)
    early = row(
        {"chosen": [*shared, ANSWER, assistant("a")], "rejected": [*shared, {**ANSWER, "content": "5"}, assistant("b")]}
    )
    assert facts(early)[1] == TALK
    assert [len(r.content) for r in early.responses] == [3, 3]
    given = row({"prompt": [user("q")], "chosen": [CALL, ANSWER, assistant("a")], "rejected": "b", "tools": [TOOL]})
    assert [len(r.content) for r in given.responses] == [3, 1]


def test_sharegpt_roles_and_function_calls() -> None:
    talk = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "a"},
    ]
    got = row({"conversations": talk})
    assert [m["role"] for m in got.prompt] == ["system", "user", "assistant", "tool"]  # type: ignore[index]
    assert got.prompt[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}  # type: ignore[index, call-overload]


def test_other_facts_of_a_row() -> None:
    data = {
        "id": 7,
        "prompt": [user("q")],
        "chosen": "a",
        "rejected": "b",
        "chat_template_kwargs": {"think": True},
        "x": 1,
    }
    got = row(data)
    assert (got.id, got.where, dict(got.template_kwargs), got.meta) == ("7", "t.jsonl:1", {"think": True}, {"x": 1})
    assert row({**data, "id": None}).id == "t.jsonl:1"
    assert convert(Record("x", data), Source("x")).unused == ("x",)
    assert row(
        {
            "prompt": "q",
            "responses": [{"text": "a", "score": 1, "logps": [-1, -2.5]}, {"text": "b", "score": 2, "logps": []}],
        }
    ).responses[0].logps == (-1, -2.5)
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    assert facts(row({"messages": [{"role": "user", "content": parts}, assistant("a")]}))[1] == (("user", "qr"),)


def test_columns_are_mapped_and_checked() -> None:
    got = row({"ask": "q", "good": "a", "bad": "b"}, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert facts(got) == ("pair", "q", ["a", "b"])
    assert problems({"good": "a", "bad": "b"}, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})[0] == (
        "t.jsonl:1: ask: expected a column (the recipe's `columns` reads prompt from it), got nothing"
    )
    with pytest.raises(UserError) as e:
        check_columns(Source("t.jsonl", columns={"chosn": "good"}))
    assert str(e.value) == (
        "t.jsonl: columns: 'chosn' is no field that po reads (write ours: theirs). Did you mean 'chosen'?"
    )


def test_every_example_of_the_manual_is_read() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    more = {"privileged": True, "response_columns": ("gold",), "token_columns": ("spread",)}
    every = Wanted(("consistency",), True, True, True, True, True, **more)
    read = []
    for section in manual.split("\n## "):
        want = Wanted(prompts=True) if section.startswith("Prompts") else every
        for block in re.findall(r"```jsonc\n(.*?)```", section, re.DOTALL):
            left = re.sub(r"\s//[^\n]*", "", block).strip()
            while left:
                data, end = json.JSONDecoder().raw_decode(left)
                left = left[end:].strip()
                read.append(row(data, want, rank_order="lower_is_better"))
    kinds = [r.kind for r in read]
    assert {k: kinds.count(k) for k in kinds} == {
        **{"pair": 11, "set": 8, "unpaired": 8, "demonstration": 3},
        "prompt": 3,
    }
    assert [len(r.responses) for r in read if r.kind == "prompt"] == [0, 1, 1]
    last = [r for r in read if r.privileged or any(x.columns or x.token_columns for x in r.responses)]
    assert [len(r.responses) for r in last] == [2, 1, 1]
    assert [r.prompt_ids for r in read if r.prompt_ids] == [(1, 22, 15, 22, 33)]


@pytest.mark.skipif(not ALPACA.exists(), reason="needs ../shared/data")
def test_real_sets_are_read_as_they_are() -> None:
    one = open_sources([Source(str(ALPACA))], "train")[0]
    done = [convert(r, one.source) for r in one.records()]
    assert {(c.format, len(c.problems), c.unused) for c in done} == {("set, completions", 0, ())}
    rows = [c.row for c in done if c.row]
    assert (len(rows), {r.kind for r in rows}, {len(r.responses) for r in rows}) == (400, {"set"}, {8})
    assert all(x.source and x.reward is not None for r in rows for x in r.responses)

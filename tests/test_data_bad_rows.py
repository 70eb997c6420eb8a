"""Forty ways for a record to be wrong, each with its exact words; several at once in one row are all named."""

from __future__ import annotations

from typing import Any

import pytest
from data_support import assistant, problems, user

P = {"prompt": "q"}
T = {"prompt": [user("q")]}
NO = ", as on the row's other responses, got nothing"
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({**P, "chosen": "a"}, ["rejected: expected text or messages, got nothing"]),
    (
        {**P, "chosen": None, "rejected": 3},
        ["chosen: expected text or messages, got null", "rejected: expected text or messages, got 3"],
    ),
    ({"chosen": "a", "rejected": "b", "prompt": None}, ["prompt: expected text or messages, got null"]),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, ["prompt: expected a list of messages, got 5"]),
    (
        {"prompt": " ", "chosen": "", "rejected": "b"},
        ["prompt: expected text that is not empty, got ' '", "chosen: expected text that is not empty, got ''"],
    ),
    ({**P, "chosen": "a", "rejected": "a"}, ["rejected: expected a different response, got the same as chosen"]),
    (
        {**P, "responses": ["a", "a", "a"], "rewards": [1, 2, 3]},
        ["responses[2]: expected a different response, got the same as every other response"],
    ),
    ({**P, "responses": ["a", "b"], "rewards": [1.0, float("nan")]}, ["rewards[1]: expected a finite number, got NaN"]),
    (
        {**P, "responses": ["a", "b"], "rewards": [float("-inf"), "7.5"]},
        ["rewards[0]: expected a finite number, got -infinity", "rewards[1]: expected a finite number, got '7.5'"],
    ),
    (
        {**P, "responses": [{"content": "a", "reward": True}, {"content": "b", "reward": 10**400}]},
        [
            "responses[0].reward: expected a finite number, got true",
            "responses[1].reward: expected a finite number, got an integer too large for a float",
        ],
    ),
    (
        {**P, "responses": ["a", "b"], "rewards": [1, 2, 3]},
        ["rewards: expected a list of 2, one per response, got a list of 3"],
    ),
    ({**P, "responses": ["a", "b"], "score": 2}, ["score: expected a list of 2, one per response, got 2"]),
    (
        {**P, "responses": [{"content": "a", "reward": 1}, {"content": "b"}]},
        ["responses[1].reward: expected a number" + NO],
    ),
    ({**P, "chosen": "a", "rejected": "b", "score_chosen": 1}, ["score_rejected: expected a number" + NO]),
    ({**P, "responses": ["a", "b"]}, ["responses: expected a reward, a rank or a label on every response, got none"]),
    (
        {**P, "responses": ["a"], "rewards": [1]},
        ["responses: expected at least two responses, or one with a label, got a list of 1"],
    ),
    ({**P, "responses": "a"}, ["responses: expected a list of responses, got 'a'"]),
    (
        {**P, "responses": [{"content": "", "reward": 1}, {"reward": 2}]},
        ["responses[1].content: expected text or messages, got nothing"],
    ),
    (
        {**P, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        [
            "answers[0].rank: expected rank_order in the recipe's source: lower_is_better or higher_is_better, "
            "got a rank without a direction"
        ],
    ),
    ({**P, "completion": "a", "label": "yes"}, ["label: expected true or false, got 'yes'"]),
    ({**P, "completion": "a", "label": None}, ["label: expected true or false, got null"]),
    ({**P, "completion": ""}, ["completion: expected text that is not empty, got ''"]),
    (
        {**P, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        [
            "chosen: expected text, as the prompt is text, got a list of 1",
            "rejected: expected text, as the prompt is text, got a list of 1",
        ],
    ),
    (
        {"prompt": [user("q"), assistant("a")], "chosen": "a", "rejected": "b"},
        ["prompt[1].role: expected the prompt's last message from user, tool or system, got 'assistant'"],
    ),
    (
        {**T, "chosen": [user("a")], "rejected": [assistant("b")]},
        ["chosen[0].role: expected 'assistant' at the start and end of a response, got 'user'"],
    ),
    (
        {"prompt": [{"role": "asistant", "content": "a"}], "chosen": "a", "rejected": "b"},
        [
            "prompt[0].role: expected one of system, developer, user, assistant, tool, got 'asistant'. "
            "Did you mean 'assistant'?"
        ],
    ),
    (
        {"prompt": [{"content": "a"}, "x"], "chosen": "a", "rejected": "b"},
        [
            "prompt[0].role: expected one of system, developer, user, assistant, tool, got nothing",
            "prompt[1]: expected a message with role and content, got 'x'",
        ],
    ),
    (
        {"prompt": [{"role": "user"}, user("")], "chosen": "a", "rejected": "b"},
        [
            "prompt[0].content: expected text, or tool_calls, got nothing",
            "prompt[1].content: expected text that is not empty, got ''",
        ],
    ),
    ({**T, "chosen": [], "rejected": "b"}, ["chosen: expected at least one message, got an empty list"]),
    ({"messages": [user("q")]}, ["prompt: expected a prompt, or first messages that messages share, got nothing"]),
    (
        {"messages": [assistant("b"), user("q")]},
        ["prompt: expected a prompt, or first messages that messages share, got nothing"],
    ),
    (
        {"prompt": "z", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        ["prompt: expected the text of a message that all conversations begin with, got 'z'"],
    ),
    (
        {"chosen": [user("q"), assistant("a")], "rejected": "b"},
        ["chosen: expected all responses as text or all as messages, got a mixture"],
    ),
    (
        {**P, "chosen": "a\ud800", "rejected": "b"},
        ["chosen: expected valid Unicode, got a lone surrogate '\\ud800' at character 2"],
    ),
    (
        {**P, "chosen": "a", "rejected": "b", "id": ["x"], "tools": "{", "chat_template_kwargs": 3},
        [
            "tools: expected a list of objects, or JSON text of one, got '{'",
            "chat_template_kwargs: expected an object, got 3",
            "id: expected text or an integer, got a list of 1",
        ],
    ),
    (
        {**P, "chosen": "a", "rejected": "b", "images": ["x.png"]},
        ["images: expected no images, sound or video (po trains on text), got a list of 1"],
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("a")]},
        ["messages[0].content[0]: expected a part of type 'text', got type 'image'"],
    ),
    (
        {**P, "responses": [{"text": "a", "score": 1, "logps": "x"}, {"text": "b", "score": 2}]},
        [
            "responses[0].logps: expected a list of numbers, one per token, got 'x'",
            "responses[1].logps: expected the sampler's log-probs" + NO,
        ],
    ),
    (
        {"foo": 1},
        ["expected chosen and rejected, responses with rewards, completion with label, or messages, got fields foo"],
    ),
    ({}, ["expected chosen and rejected, responses with rewards, completion with label, or messages, got fields none"]),
]


@pytest.mark.parametrize(("data", "want"), BAD)
def test_bad_row(data: dict[str, Any], want: list[str]) -> None:
    assert problems(data) == [f"t.jsonl:1: {line}" for line in want]

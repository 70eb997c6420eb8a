"""Prompts that lose their beginning: text behind BOS, conversations their oldest turns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from po.data.messages import Messages
from po.data.rows import Row
from po.data.tokenize import Encoder, Ids


def least_prompt(row: Row, prompt_ids: Ids, encode: Encoder) -> int:
    """Tokens of the shortest prompt: BOS and one token of text, or the system message and the last user turn. What a
    rollout was sampled from is not cut."""
    if row.prompt_ids is not None:
        return len(prompt_ids)
    if isinstance(row.prompt, str):
        return min(len(encode.lead) + 1, len(prompt_ids))
    starts = _later_turns(row.prompt)
    return len(encode(_from_turn(row, starts[-1])).prompt_ids) if starts else len(prompt_ids)


def shortened(row: Row, prompt_ids: Ids, encode: Encoder, room: int) -> tuple[Ids, Mapping[int, Ids]]:
    """Text: BOS and the last tokens. Messages: without the oldest turns, rendered anew with the responses (which come
    too), so that the header stays whole."""
    if isinstance(row.prompt, str):
        lead = encode.lead if prompt_ids[: len(encode.lead)] == encode.lead else ()
        return lead + prompt_ids[len(prompt_ids) - (room - len(lead)) :], {}
    for start in _later_turns(row.prompt):
        coded = encode(_from_turn(row, start))
        if len(coded.prompt_ids) <= room:
            return coded.prompt_ids, dict(enumerate(coded.response_ids))
    raise AssertionError("the last turn alone was found to fit")


def _later_turns(prompt: Messages) -> list[int]:
    """Where each user turn but the first begins."""
    return [i for i, m in enumerate(prompt) if m["role"] == "user"][1:]


def _from_turn(row: Row, start: int) -> Row:
    assert not isinstance(row.prompt, str)
    head = tuple(itertools.takewhile(lambda m: m["role"] in ("system", "developer"), row.prompt))
    return replace(row, prompt=(*head, *row.prompt[start:]))

"""Rows that are prompts for a sampler. Only a prompt is needed; every field reaches the reward functions.

What a row has of responses is kept as its own (reference solutions, a pair). What cannot be a response, a reward or a
label is no fault here but a field like any other; so is `answer`, which rewards compare with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from po.data import facts
from po.data.messages import is_message
from po.data.rows import Message
from po.data.view import Candidate, View

LISTS = ("responses", "completions")
SINGLE = ("completion", "response", "output")
_CONVERSATIONS = ("messages", "conversations")


def own_responses(view: View) -> list[Candidate]:
    """The responses that the row brings, mostly none."""
    for name in LISTS:
        value = view.data.get(name)
        if isinstance(value, list | tuple) and value and all(isinstance(v, str | list | tuple | dict) for v in value):
            view.used.add(name)
            return _bare(facts.listed(name, value, view.wanted))
    for name in (*SINGLE, *_CONVERSATIONS):
        value = view.data.get(name)
        if _answered(value) if name in _CONVERSATIONS else _is_content(value):
            view.used.add(name)
            return [Candidate(name, value)]
    return []


def _bare(candidates: list[Candidate]) -> list[Candidate]:
    """What belongs to a response's tokens goes: it is tokenized anew."""
    for c in candidates:
        c.logps = c.token_ids = c.embedding = c.teacher = None
        c.columns = {}
    return candidates


def _is_content(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return is_message(value) or (isinstance(value, list | tuple) and bool(value) and all(map(is_message, value)))


def _answered(value: object) -> bool:
    """Whether messages end with the assistant's."""
    if not isinstance(value, list | tuple) or not _is_content(value):
        return False
    return value[-1].get("role", value[-1].get("from")) in ("assistant", "gpt")


def scored(view: View, candidates: Sequence[Candidate], rewards: Sequence[str], labels: Sequence[str]) -> None:
    """Give the row's own responses the rewards and labels that stand beside them: one for each, or a list of them."""
    for fact, names, fits in (("reward", rewards, _is_number), ("label", labels, _is_label)):
        _give(view, candidates, fact, names, fits)


def _give(
    view: View, candidates: Sequence[Candidate], fact: str, names: Sequence[str], fits: Callable[[object], bool]
) -> None:
    for name in names:
        value = view.data.get(name)
        values = value if isinstance(value, list | tuple) else [value]
        if candidates and len(values) == len(candidates) and all(map(fits, values)):
            for c, v in zip(candidates, values):
                setattr(c, fact, v)
            return


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_label(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, int | float) and value in (-1, 0, 1))


def as_record(data: Mapping[str, Any], given: Mapping[str, Any], prompt: str | Sequence[Message]) -> str:
    """All fields as JSON, under the data's names and po's; `prompt` as the model is shown it. Dates and the like, which
    JSON does not know, become text."""
    return json.dumps({**data, **given, "prompt": prompt}, default=str)

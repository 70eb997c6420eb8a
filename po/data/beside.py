"""What a record says beside prompt and responses: its id, tools, the template's switches, token ids of rollouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from po.data.report import NOTHING, Faults
from po.data.view import Candidate, View

_TOOLS = "a list of objects, or JSON text of one"
_IDS = "a list of token ids"


def renamed(data: Mapping[str, Any], columns: Mapping[str, str], faults: Faults) -> dict[str, Any]:
    """The record under po's names (`columns` of the source: ours, theirs)."""
    out = {k: v for k, v in data.items() if k not in columns.values()}
    for ours, theirs in columns.items():
        if theirs in data:
            out[ours] = data[theirs]
        else:
            faults.add(theirs, f"a column (the recipe's `columns` reads {ours} from it)", NOTHING)
    return out


def row_id(view: View, where: str) -> str:
    """The row's own, else its place."""
    value = view.get("id")
    if value is None:
        return where
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        view.faults.add("id", "text or an integer", value)
    return str(value)


def tools(view: View) -> tuple[Any, ...] | None:
    """Objects, from a list or its JSON text."""
    value = view.get("tools")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            view.faults.add("tools", _TOOLS, value)
            return None
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(t, dict) for t in value):
        view.faults.add("tools", _TOOLS, value)
        return None
    return tuple(value)


def template_kwargs(view: View) -> Mapping[str, Any]:
    """chat_template_kwargs."""
    value = view.get("chat_template_kwargs")
    if value is None or isinstance(value, dict):
        return value or {}
    view.faults.add("chat_template_kwargs", "an object", value)
    return {}


def sampled(view: View, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """prompt_ids and tokenizer of a row whose responses have token ids; {} of others, and of prompts, whose responses
    are tokenized anew."""
    if view.wanted.prompts or all(c.token_ids is None for c in candidates):
        return {}
    if view.data.get("prompt_ids") is None:
        view.faults.add("prompt_ids", f"{_IDS}, as the responses have token_ids", NOTHING)
    tokenizer = view.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str):
        view.faults.add("tokenizer", "text, the key of a tokenizer", tokenizer)
    return {"prompt_ids": token_ids(view.get("prompt_ids"), "prompt_ids", view.faults), "tokenizer": tokenizer}


def token_ids(value: object, field: str, faults: Faults) -> tuple[int, ...] | None:
    """At least one token id."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        faults.add(field, _IDS, value)
        return None
    for t, i in enumerate(value):
        if type(i) is not int or not 0 <= i < 2**31:
            faults.add(f"{field}[{t}]", "a token id", i)
            return None
    return tuple(value)


def ended(candidate: Candidate, faults: Faults) -> bool:
    """Whether a response ended by itself; so it did where nothing is said."""
    if isinstance(candidate.ended, bool | None):
        return candidate.ended is not False
    faults.add(candidate.at("ended"), "true or false", candidate.ended)
    return True

"""A row as po writes it: what po.data reads back as the same row, with all that the record said besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from po.data.facts import CONTENT, SCORE
from po.data.formats import CHOSEN, LABELS, ONE, OTHERS, PAIR_SCORES, RANKS, REJECTED, REWARDS, SET
from po.data.messages import is_message
from po.data.rows import Response, Row
from po.data.wanted import Wanted

WANTED = Wanted(unlabelled=True, single=True)  # reads whatever a row may say of its labels and rewards
_SCORES = tuple(p.format(s) for p in PAIR_SCORES for s in ("chosen", "rejected"))
# Unread in the record, but read where they stand in a row of po: kept under `original`.
_MOVED = {*CHOSEN, *REJECTED, *REWARDS, *RANKS, *LABELS, *OTHERS, *SET, *ONE, *_SCORES} - {"answer", "response"}
_READ = ("label", "logps", "token_ids", "ended", "rank")


def as_json(row: Row, data: Mapping[str, Any]) -> dict[str, Any]:
    """The row for a file. `data` is the record it came from, under po's names."""
    facts: dict[str, Any] = {"tools": row.tools, "chat_template_kwargs": row.template_kwargs or None}
    facts |= {"prompt_ids": row.prompt_ids, "tokenizer": row.tokenizer}
    out = {"id": row.id, "prompt": row.prompt, **{k: v for k, v in facts.items() if v is not None}}
    out |= _responses(row, _originals(data, len(row.responses)))
    meta = {k: v for k, v in row.meta.items() if v is not None}
    moved = {k: v for k, v in meta.items() if k in _MOVED or k in out}
    out |= {k: v for k, v in meta.items() if k not in moved and k != "original"}
    original = {**meta.get("original", {}), **moved} if isinstance(meta.get("original", {}), dict) else moved
    return {**out, "original": original} if original else out


def _responses(row: Row, originals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if row.chosen_first:
        sides = dict(zip(("chosen", "rejected"), row.responses))
        rewards = {f"{side}_reward": r.reward for side, r in sides.items() if r.reward is not None}
        return {**{side: r.content for side, r in sides.items()}, **rewards}
    if len(row.responses) == 1 and not originals[0] and row.responses[0].token_ids is None:
        one = _response(row.responses[0], {})
        return {"completion": one.pop("content"), **one}
    return {"responses": [_response(r, o) for r, o in zip(row.responses, originals)]}


def _response(response: Response, original: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"content": response.content}
    for name in ("reward", "source", "logps", "token_ids"):
        value = getattr(response, name)
        if value is not None:
            out[name] = value
    if response.label is not None:
        out["label"] = None if response.label == 0 else response.label > 0
    if not response.ended:
        out["ended"] = False
    return out | {k: v for k, v in original.items() if k not in out}


def _originals(data: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What each response's object says that a Row does not hold."""
    found = next((data[name] for name in SET if isinstance(data.get(name), list | tuple)), ())
    if len(found) != count:
        return [{}] * count
    return [_unread(one) if isinstance(one, dict) and not is_message(one) else {} for one in found]


def _unread(one: Mapping[str, Any]) -> dict[str, Any]:
    content = next((k for k in CONTENT if one.get(k) is not None), None)
    score = next((k for k in SCORE if one.get(k) is not None), None)
    who = next((k for k in ("model", "source", "sampler") if k in one), None)
    read = {content, score, who, *_READ}
    return {k: v for k, v in one.items() if k not in read and v is not None} | _rank(one)


def _rank(one: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": one["rank"]} if one.get("rank") is not None else {}

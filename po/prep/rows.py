"""Rows as the steps of a preparation see them, and as they are written: in po's form, with all that was said besides.

Any format that po reads is read (po.data.formats). Fields of the row that po does not know are kept, and those of
responses that are objects in a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from po.data.facts import CONTENT, SCORE
from po.data.formats import CHOSEN, LABELS, ONE, OTHERS, PAIR_SCORES, RANKS, REJECTED, REWARDS, SET, convert
from po.data.messages import is_message
from po.data.read import Record
from po.data.report import Problem, describe
from po.data.rows import Response, Row
from po.data.wanted import Wanted
from po.spec import Source

WANTED = Wanted(unlabelled=True, single=True)  # whatever a row may say of its labels and rewards
EVERYTHING = Wanted(unlabelled=True, single=True, embedding=True, prompt_embedding=True, teacher=True, privileged=True)
UNSCORED = replace(EVERYTHING, unscored=True)  # the same of answers that are yet to be scored
PROMPTS = Wanted(prompts=True)
_SCORES = tuple(p.format(s) for p in PAIR_SCORES for s in ("chosen", "rejected"))
# Unread in the record, but read where they stand in a row of po: kept under `original`.
_MOVED = {*CHOSEN, *REJECTED, *REWARDS, *RANKS, *LABELS, *OTHERS, *SET, *ONE, *_SCORES} - {"answer", "response"}
_FACTS = [f.name for f in fields(Response) if f.name not in ("content", "columns", "token_columns", "ended")]
_READ = ("label", "logps", "token_ids", "ended", "rank")


@dataclass(frozen=True)
class ScoredSet:
    """A row that was understood, its fields besides the responses, and each response as an object."""

    row: Row
    fields: Mapping[str, Any]  # id and prompt among them
    answers: tuple[Mapping[str, Any], ...]

    @property
    def texts(self) -> list[str]:
        """The answers' contents, to tell them apart by."""
        return [text_of(r.content) for r in self.row.responses]

    @property
    def rewards(self) -> list[float] | None:
        """A number for each answer: rewards, else labels; None where the row has neither, or unlabelled answers."""
        rewards = [r.reward for r in self.row.responses]
        if all(r is not None for r in rewards):
            return [float(r) for r in rewards if r is not None]
        labels = [r.label for r in self.row.responses]
        return None if any(x in (None, 0) for x in labels) else [float(x) for x in labels if x is not None]

    @property
    def sources(self) -> list[str | None]:
        """Who wrote the answers; of a pair also by chosen_source and rejected_source."""
        beside = [self.fields.get(f"{side}_source") for side in ("chosen", "rejected")]
        given = [r.source for r in self.row.responses]
        return [g or b for g, b in zip(given, beside, strict=True)] if self.row.is_pair else given

    def with_answers(self, answers: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """The row with other responses and further fields, in po's form."""
        return {**self.fields, **more, "responses": [dict(a) for a in answers]}

    def as_pair(self, better: int, worse: int, **more: Any) -> dict[str, Any]:
        """chosen and rejected, and what was said of either as chosen_NAME and rejected_NAME."""
        return pair_of(self.fields, self.answers[better], self.answers[worse], **more)


def read_set(record: Record, source: Source, wanted: Wanted = EVERYTHING) -> ScoredSet | tuple[Problem, ...]:
    """The record's set, or everything that is wrong with it."""
    converted = convert(record, source, wanted)
    if converted.row is None:
        return converted.problems
    row = converted.row
    beside = [{}] * len(row.responses) if row.chosen_first else _unread_of(record.data or {}, len(row.responses))
    answers = tuple(_answer(r, own) for r, own in zip(row.responses, beside, strict=True))
    return ScoredSet(row, _fields(row), answers)


def pair_of(
    fields: Mapping[str, Any], better: Mapping[str, Any], worse: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A row chosen over rejected from two responses as objects."""
    sides = {"chosen": better, "rejected": worse}
    facts = {f"{side}_{k}": v for side, one in sides.items() for k, v in one.items() if k not in ("content", "label")}
    return {**fields, **{side: one["content"] for side, one in sides.items()}, **facts, **more}


def as_json(row: Row, data: Mapping[str, Any]) -> dict[str, Any]:
    """The row for a file, in the form that it came in. `data` is the record it came from, under po's names."""
    responses = _responses(row, data)
    return _fields(row, responses) | responses


def _responses(row: Row, data: Mapping[str, Any]) -> dict[str, Any]:
    if row.chosen_first:
        sides = dict(zip(("chosen", "rejected"), row.responses))
        rewards = {f"{side}_reward": r.reward for side, r in sides.items() if r.reward is not None}
        return {**{side: r.content for side, r in sides.items()}, **rewards}
    beside = _unread_of(data, len(row.responses))
    if len(row.responses) == 1 and not beside[0] and row.responses[0].token_ids is None:
        one = _answer(row.responses[0], {})
        return {"completion": one.pop("content"), **one}
    return {"responses": [_answer(r, own) for r, own in zip(row.responses, beside)]}


def _fields(row: Row, taken: Collection[str] = ()) -> dict[str, Any]:
    """Everything but the responses. What would be read as something else, or is taken, moves into `original`."""
    said = {
        "tools": row.tools,
        "chat_template_kwargs": row.template_kwargs or None,
        "prompt_embedding": row.prompt_embedding,
        "prompt_ids": row.prompt_ids,
        "tokenizer": row.tokenizer,
        "privileged_prompt": row.privileged,
    }
    out = {"id": row.id, "prompt": row.prompt, **{k: v for k, v in said.items() if v is not None}}
    meta = {k: v for k, v in row.meta.items() if v is not None}
    moved = {k: v for k, v in meta.items() if k in _MOVED or k in out or k in taken}
    out |= {k: v for k, v in meta.items() if k not in moved}
    if not moved:
        return out
    before = meta.get("original", {})
    return {**out, "original": {**(before if isinstance(before, dict) else {"original": before}), **moved}}


def _answer(r: Response, beside: Mapping[str, Any]) -> dict[str, Any]:
    """A response as an object. beside: what else was said of it."""
    said = {name: getattr(r, name) for name in _FACTS}
    out = {"content": r.content, **{k: v for k, v in said.items() if v is not None}}
    if r.label is not None:
        out["label"] = None if r.label == 0 else r.label > 0
    if r.teacher is not None:
        teacher = {f.name: getattr(r.teacher, f.name) for f in fields(r.teacher)}
        out["teacher"] = {k: v for k, v in teacher.items() if v is not None}
    if not r.ended:
        out["ended"] = False
    return out | {k: v for k, v in beside.items() if k not in out}


def _unread_of(data: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
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
    rank = {"rank": one["rank"]} if one.get("rank") is not None else {}
    return {k: v for k, v in one.items() if k not in read and v is not None} | rank


def text_of(content: object) -> str:
    """A text as it is, messages as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)


def numbers(where: str, field: str, value: object) -> list[float] | Problem:
    """A list of finite numbers, or an object of them (its values in the order of its names)."""
    found: Any = [value[k] for k in sorted(value)] if isinstance(value, dict) else value
    if isinstance(found, list | tuple) and found and all(map(_finite, found)):
        return [float(x) for x in found]
    return Problem(where, field, "finite numbers, in a list or by name", describe(value))


def _finite(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

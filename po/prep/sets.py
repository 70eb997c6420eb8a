"""Scored answers as the steps that pair, select and repair see them, and how they are written back.

Any format that po reads is read (po.data.formats). Fields of the row that po does not know are kept, and those of
responses that are objects in `responses`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from po.data.formats import convert
from po.data.read import Record
from po.data.report import Problem, describe
from po.data.rows import Response, Row
from po.data.wanted import Wanted
from po.spec import Source

WANTED = Wanted(unlabelled=True, single=True, embedding=True, prompt_embedding=True, teacher=True, privileged=True)
_FACTS = [f.name for f in fields(Response) if f.name not in ("content", "columns", "token_columns", "ended")]


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


def pair_of(
    fields: Mapping[str, Any], better: Mapping[str, Any], worse: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A row chosen over rejected from two responses as objects."""
    sides = {"chosen": better, "rejected": worse}
    facts = {f"{side}_{k}": v for side, one in sides.items() for k, v in one.items() if k not in ("content", "label")}
    return {**fields, **{side: one["content"] for side, one in sides.items()}, **facts, **more}


def text_of(content: object) -> str:
    """A text as it is, messages as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)


def read_set(record: Record, source: Source, wanted: Wanted = WANTED) -> ScoredSet | tuple[Problem, ...]:
    """The record's set, or everything that is wrong with it."""
    converted = convert(record, source, wanted)
    if converted.row is None:
        return converted.problems
    row, own = converted.row, (record.data or {}).get("responses")
    raw = own if isinstance(own, list) and not row.chosen_first else []
    known = [a if isinstance(a, dict) and "content" in a else {} for a in raw] or [{}] * len(row.responses)
    return ScoredSet(row, _fields(row), tuple({**a, **_answer(r)} for a, r in zip(known, row.responses, strict=True)))


def _fields(row: Row) -> dict[str, Any]:
    said = {
        "tools": row.tools,
        "chat_template_kwargs": row.template_kwargs or None,
        "prompt_embedding": row.prompt_embedding,
        "prompt_ids": row.prompt_ids,
        "tokenizer": row.tokenizer,
        "privileged_prompt": row.privileged,
    }
    return {"id": row.id, "prompt": row.prompt, **{k: v for k, v in said.items() if v is not None}, **row.meta}


def _answer(r: Response) -> dict[str, Any]:
    said = {name: getattr(r, name) for name in _FACTS}
    out = {"content": r.content, **{k: v for k, v in said.items() if v is not None}}
    if r.label is not None:
        out["label"] = None if r.label == 0 else r.label > 0
    if r.teacher is not None:
        teacher = {f.name: getattr(r.teacher, f.name) for f in fields(r.teacher)}
        out["teacher"] = {k: v for k, v in teacher.items() if v is not None}
    return out if r.ended else {**out, "ended": False}


def numbers(where: str, field: str, value: object) -> list[float] | Problem:
    """A list of finite numbers, or an object of them (its values in the order of its names)."""
    found: Any = [value[k] for k in sorted(value)] if isinstance(value, dict) else value
    if isinstance(found, list | tuple) and found and all(map(_finite, found)):
        return [float(x) for x in found]
    return Problem(where, field, "finite numbers, in a list or by name", describe(value))


def _finite(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

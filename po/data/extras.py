"""What only some heads read of a row: embeddings, a teacher's log-probs, numbers under their own names."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

from po.data.facts import check_parallel, complete, number
from po.data.report import NOTHING, Faults, Problem, Say
from po.data.rows import Response, Row, Teacher
from po.data.view import Candidate, View

BESIDE = {"embedding": "embeddings", "teacher": "teachers", "logps": "logps"}  # of a response; a list for all
_TEACHER = "an object with ids and logps, a list per token each"


def attach(view: View, candidates: Sequence[Candidate], pattern: str, names: Sequence[str]) -> None:
    """Give each response what stands beside it in a column of its own, e.g. chosen_embedding."""
    for fact in BESIDE:
        if getattr(view.wanted, fact):
            for c, name in zip(candidates, names):
                column = pattern.format(name, fact)
                setattr(c, fact, view.get(column))
                c.fields = {**c.fields, fact: column}
    for fact in view.wanted.of_responses:
        for c, name in zip(candidates, names):
            _give(c, fact, view.get(pattern.format(name, fact)), pattern.format(name, fact))


def attach_lists(view: View, candidates: Sequence[Candidate]) -> None:
    """Give each response its entry of the lists of columns beside the responses: `name`, unless that is a column of the
    row itself, or `names`."""
    for fact in view.wanted.of_responses:
        found = view.first((f"{fact}s",) if fact in view.wanted.columns else (fact, f"{fact}s"))
        if found and check_parallel(candidates, *found, view.faults):
            for k, (c, value) in enumerate(zip(candidates, found[1])):
                _give(c, fact, value, f"{found[0]}[{k}]")


def _give(c: Candidate, name: str, value: Any, field: str) -> None:
    c.fields = {**c.fields, name: field}
    if value is not None:
        c.columns[name] = value


def read_of_responses(view: View, candidates: Sequence[Candidate]) -> dict[str, list[Any]]:
    """For each response its columns and token_columns. What none of the row's has is left to `check_needs`."""
    wanted, faults = view.wanted, view.faults
    given = {name for c in candidates for name in c.columns}
    read: dict[str, list[Any]] = {"columns": [], "token_columns": []}
    for c in candidates:
        of: dict[str, dict[str, Any]] = {"columns": {}, "token_columns": {}}
        for name in [n for n in wanted.of_responses if n in given]:
            per_token = name in wanted.token_columns
            expected = "a list of numbers, one per token" if per_token else "a finite number"
            value, field = c.columns.get(name), c.at(name)
            if value is None:
                faults.add(field, f"{expected}, as on the row's other responses", NOTHING)
            elif per_token:
                of["token_columns"][name] = _numbers(value, field, expected, faults)
            else:
                of["columns"][name] = number(value, field, faults)
        for kind, found in of.items():
            read[kind].append(found)
    return read


def read_embeddings(candidates: Sequence[Candidate], faults: Faults) -> list[tuple[float, ...] | None]:
    """An embedding for each response, or None and faults."""
    complete(candidates, "embedding", "an embedding", faults)
    return [None if c.embedding is None else vector(c.embedding, c.at("embedding"), faults) for c in candidates]


def read_teachers(candidates: Sequence[Candidate], faults: Faults) -> list[Teacher | None]:
    """A teacher for each response, or None and faults."""
    complete(candidates, "teacher", _TEACHER, faults)
    return [None if c.teacher is None else _teacher(c.teacher, c.at("teacher"), faults) for c in candidates]


def read_columns(view: View) -> dict[str, float]:
    """The numbers that heads declare. One that the row lacks is left to `check_needs`, which knows whose it is."""
    given = {name: view.get(name) for name in view.wanted.columns}
    read = {name: number(v, name, view.faults) for name, v in given.items() if v is not None}
    return {name: v for name, v in read.items() if v is not None}


def read_prompt_embedding(view: View) -> tuple[float, ...] | None:
    value = view.get("prompt_embedding") if view.wanted.prompt_embedding else None
    return None if value is None else vector(value, "prompt_embedding", view.faults)


def vector(value: object, field: str, faults: Faults) -> tuple[float, ...] | None:
    """At least one finite number."""
    if not value:
        faults.add(field, "a list of numbers", value)
        return None
    return _numbers(value, field, "a list of numbers", faults)


def _numbers(value: object, field: str, expected: str, faults: Faults) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple):
        faults.add(field, expected, value)
        return None
    if all(type(x) is float and math.isfinite(x) for x in value):  # long lists, fast
        return tuple(value)
    out = [number(x, f"{field}[{i}]", faults) for i, x in enumerate(value)]
    return tuple(x for x in out if x is not None)


def _teacher(value: Any, field: str, faults: Faults) -> Teacher | None:
    if not isinstance(value, dict):
        faults.add(field, _TEACHER, value)
        return None
    before = len(faults.found)
    ids = _per_token(value.get("ids", NOTHING), f"{field}.ids", faults)
    for t, some in enumerate(ids):
        _check_ids(some, f"{field}.ids[{t}]", faults)
    read = {"ids": ids}
    for name in ("logps", "ref_logps"):
        if name == "logps" or value.get(name) is not None:
            lists = _per_token(value.get(name, NOTHING), f"{field}.{name}", faults)
            found = [_numbers(some, f"{field}.{name}[{t}]", "", faults) for t, some in enumerate(lists)]
            read[name] = [some for some in found if some is not None]
    if len(faults.found) == before:
        for name in [name for name in read if name != "ids"]:
            _check_sizes(ids, read[name], f"{field}.{name}", faults)
    return Teacher(**{name: tuple(map(tuple, lists)) for name, lists in read.items()})


def _per_token(value: object, field: str, faults: Faults) -> list[Sequence[Any]]:
    if not isinstance(value, list | tuple):
        faults.add(field, "a list per token", value)
        return []
    for t, some in enumerate(value):
        if not isinstance(some, list | tuple):
            faults.add(f"{field}[{t}]", "a list", some)
            return []
    return list(value)


def _check_ids(some: Sequence[object], field: str, faults: Faults) -> None:
    if not all(type(i) is int and 0 <= i < 2**31 for i in some) or len(set(some)) < len(some):
        faults.add(field, "different token ids", Say(str(list(some))[:60]))


def _check_sizes(ids: Sequence[Sized], lists: Sequence[Sized], field: str, faults: Faults) -> None:
    if len(ids) != len(lists):
        faults.add(field, f"a list of {len(ids)}, one per token as in ids", lists)
        return
    for t, (some, numbers) in enumerate(zip(ids, lists)):
        if len(some) != len(numbers):
            faults.add(f"{field}[{t}]", f"{len(some)} numbers, one per id", Say(str(len(numbers))))
            return


class Alike:
    """Checks that all rows have embeddings of one length, and a teacher's own reference all or none."""

    def __init__(self) -> None:
        self._size: tuple[int, str] | None = None  # and the row that set it
        self._ref: tuple[bool, str] | None = None

    def problems(self, row: Row) -> list[Problem]:
        """In what a row differs from those before it."""
        named = [(f"responses[{k}].embedding", r.embedding) for k, r in enumerate(row.responses)]
        out = []
        for field, v in [*named, ("prompt_embedding", row.prompt_embedding)]:
            if v is not None:
                self._size = self._size or (len(v), row.where)
                if len(v) != self._size[0]:
                    want = f"{self._size[0]} numbers, as in {self._size[1]}"
                    out.append(Problem(row.where, field, want, str(len(v))))
        return out + [p for k, r in enumerate(row.responses) for p in self._teacher(row.where, k, r)]

    def _teacher(self, where: str, k: int, r: Response) -> list[Problem]:
        if r.teacher is None:
            return []
        has = r.teacher.ref_logps is not None
        self._ref = self._ref or (has, where)
        if has == self._ref[0]:
            return []
        found = ("a list per token", "nothing")
        want, got = found if self._ref[0] else found[::-1]
        return [Problem(where, f"responses[{k}].teacher.ref_logps", f"{want}, as in {self._ref[1]}", got)]

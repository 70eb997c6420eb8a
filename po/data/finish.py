"""A row and the token ids that are left of it -> the Example that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from po.data.rows import Example, Response, Row

Ids = tuple[int, ...]


def example_of(
    row: Row, prompt_ids: Ids, response_ids: Mapping[int, Ids], privileged_ids: Ids | None = None
) -> Example:
    """response_ids: of the responses that are kept, by their index in the row. What is per token is cut with them."""
    chosen = [row.responses[k] for k in response_ids]
    ids = tuple(response_ids.values())
    pair = row.is_pair and len(chosen) == len(row.responses)
    ended = tuple(r.ended for r in chosen)
    return Example(
        row.id,
        row.where,
        prompt_ids,
        ids,
        reward=_all([r.reward for r in chosen]),
        label=(1, -1) if pair else _all([r.label for r in chosen]),
        logps=_all([r.logps and r.logps[: len(i)] for r, i in zip(chosen, ids)]),
        chosen_first=pair,
        columns=tuple(row.columns.items()),
        embedding=_all([r.embedding for r in chosen]),
        prompt_embedding=row.prompt_embedding,
        teacher_ids=_of_teacher("ids", chosen, ids),
        teacher_logps=_of_teacher("logps", chosen, ids),
        teacher_ref_logps=_of_teacher("ref_logps", chosen, ids),
        ended=None if all(ended) else ended,
        record=row.record,
        privileged_ids=privileged_ids,
        response_columns=_columns([r.columns for r in chosen]),
        token_columns=_columns([{n: x[: len(i)] for n, x in r.token_columns.items()} for r, i in zip(chosen, ids)]),
    )


def _columns(given: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """By name, what each response has; all of a row have the same names."""
    return tuple((name, tuple(one[name] for one in given)) for name in given[0]) if given else ()


def _all(values: Sequence[Any]) -> Any:
    """The values, or None where one is missing or there are none."""
    return None if not values or any(v is None for v in values) else tuple(values)


def _of_teacher(name: str, responses: Sequence[Response], ids: Sequence[Ids]) -> Any:
    """A part of each response's teacher, as long as the response is now."""
    parts = [getattr(r.teacher, name, None) for r in responses]
    return _all([part and part[: len(i)] for part, i in zip(parts, ids)])

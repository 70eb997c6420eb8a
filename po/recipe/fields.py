"""From plain values to a dataclass: types coerced by each field's annotation, plain English where they do not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter

from po.errors import suggest
from po.recipe.report import Report
from po.recipe.text import Keys

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    dict: "a mapping",
    list: "a list",
}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


class MisfitError(ValueError):
    """A value that does not fit its field; the message says what was expected."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return {k: v for k, v in get_type_hints(cls, include_extras=True).items() if k in {f.name for f in fields(cls)}}


def hints(cls: type) -> dict[str, Any]:
    """The annotated types of a dataclass's fields, ranges included."""
    return _hints(cls)


def arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone. An enum beside `str` stands for its values."""
    if get_origin(hint) not in (Union, UnionType):
        return (hint,)
    found = get_args(hint)
    named = any(isinstance(a, type) and issubclass(a, Enum) for a in found)
    return tuple(a for a in found if not (named and a is str))


def choices(hint: Any) -> list[Any]:
    """The values a field may take, where they are listed."""
    found: list[Any] = []
    for arm in arms(hint):
        if get_origin(arm) is Literal:
            found += get_args(arm)
        elif isinstance(arm, type) and issubclass(arm, Enum):
            found += [member.value for member in arm]
    return found


def describe(hint: Any) -> str:
    """A type in English: 'a number > 0', 'text or null', "one of 'drop', 'error'"."""
    listed = choices(hint)
    some = ", ".join(map(shown, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    parts = [] if not listed else [("one of " if len(listed) > 1 else "") + some]
    parts += [_describe(a) for a in arms(hint) if not choices(a)]
    return " or ".join(dict.fromkeys(parts))


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [f"{sign} {getattr(m, name)}" for m in hint.__metadata__ for name, sign in _BOUNDS if hasattr(m, name)]
        return " ".join([describe(args[0]), " and ".join(bounds)]).strip()
    if origin in (tuple, list):
        return f"a list of {_plural(args[0])}"
    if hint is Any:
        return "anything"
    return _WORDS.get(origin or hint, "a mapping" if origin is not None else str(getattr(hint, "__name__", hint)))


def _plural(hint: Any) -> str:
    return {str: "texts", float: "numbers", int: "whole numbers"}.get(hint, "values")


def shown(value: Any) -> str:
    """A value as the recipe would write it, cut to a line."""
    if isinstance(value, str):
        return repr(value) if len(value) < 80 else repr(value[:77] + "...")
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()
    return text if len(text) < 80 else text[:77] + "..."


def fit(hint: Any, value: Any) -> Any:
    """The value as the field's type. Raises MisfitError: expected ..., got ...."""
    sequence = any(get_origin(a) in (tuple, list) for a in arms(hint))
    if sequence and isinstance(value, str) and str not in arms(hint):
        value = [value]
    listed = choices(hint)
    if isinstance(value, str) and value in listed:
        return value
    try:
        if isinstance(value, bool) and not _takes_bool(hint):
            raise ValueError("pydantic would read true as 1")
        out = TypeAdapter(_plain(hint)).validate_python(value)
        if isinstance(out, float) and not math.isfinite(out):
            raise ValueError("an infinite hyperparameter has no meaning")
    except ValueError:  # pydantic's ValidationError is one
        quotes = "; write it in quotes" if _is_number(value) and str in arms(hint) else ""
        raise MisfitError(f"expected {describe(hint)}, got {shown(value)}{quotes}.{_nearest(value, listed)}") from None
    return out


def _nearest(value: Any, listed: list[Any]) -> str:
    if not isinstance(value, str) or not value:
        return ""
    words = [w for w in listed if isinstance(w, str)]
    return suggest(value, [w for w in words if w.startswith(value)][:1] or words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _takes_bool(hint: Any) -> bool:
    return any(a in (bool, Any) for a in arms(hint)) or True in [c for c in choices(hint) if isinstance(c, bool)]


def _plain(hint: Any) -> Any:
    """The hint for pydantic: enums beside `str` as the literals that they list."""
    plain = [Literal[tuple(choices(a))] if isinstance(a, type) and issubclass(a, Enum) else a for a in arms(hint)]
    return Union[tuple(plain)] if len(plain) > 1 else plain[0]  # noqa: UP007  (made at run time)


def parse(cls: type[T], raw: Any, at: Keys, report: Report, renamed: Mapping[str, str] = {}) -> T | None:
    """A dataclass from a mapping; None where something was wrong, which `report` then knows.

    renamed: recipe keys that are not the field's name, {"from": "source"}.
    """
    if not isinstance(raw, Mapping):
        report.wrong(at, f"expected a mapping, got {shown(raw)}")
        return None
    before, values = len(report.problems), {}
    keys = {next((k for k, f in renamed.items() if f == name), name): name for name in hints(cls)}
    for key, value in raw.items():
        if key not in keys:
            unknown(key, list(keys), at, report)
            continue
        try:
            values[keys[key]] = fit(hints(cls)[keys[key]], value)
        except MisfitError as e:
            report.wrong((*at, key), str(e))
    for f in fields(cls):  # type: ignore[arg-type]  # every cls is a dataclass
        key = next(k for k, name in keys.items() if name == f.name)
        if f.default is MISSING and f.default_factory is MISSING and key not in raw:
            report.wrong((*at, key), f"is missing; expected {describe(hints(cls)[f.name])}.")
    return cls(**values) if len(report.problems) == before else None


def unknown(key: str, known: Sequence[str], at: Keys, report: Report, what: str = "unknown key") -> None:
    """Report a key that a section does not have."""
    report.wrong((*at, key), f"{what}.{suggest(key, known)} It has: {', '.join(known)}.")

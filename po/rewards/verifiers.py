"""Verifiers that read one completion at a time: exact, format, length, repetition, soft_overlong.

A verifier is a frozen dataclass whose fields are its options. `reward` gives a number, or None where the row's column
is null (the reward does not apply to it); what it raises fails that completion alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from po.rewards.cells import Call, Failure, failed, text_of


@dataclass(frozen=True, kw_only=True)
class Rowwise:
    """What the verifiers of this module and of `mathematics` share: they go from completion to completion."""

    rows: ClassVar[bool] = True
    time_limit: Annotated[float, Gt(0)] = 5.0  # seconds for one completion

    def load(self) -> None:
        """Nothing to load."""

    def patience(self, seconds: float) -> float:
        """One completion has its limit, whatever the call has."""
        return self.time_limit

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of the row that it reads."""
        return ()

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """Of one completion: its text, its token ids, its row's columns."""
        raise NotImplementedError

    def answers(self, call: Call) -> Iterator[float | Failure | None]:
        """One after the other."""
        for i, completion in enumerate(call.completions):
            ids = None if call.completion_ids is None else call.completion_ids[i]
            try:
                yield self.reward(text_of(completion), ids, {k: v[i] for k, v in call.columns.items()})
            except Exception as e:  # noqa: BLE001 - one completion must not cost the others their reward
                yield failed(e)


def column(row: dict[str, Any], name: str) -> Any:
    """A column of the row; KeyError names it where there is none."""
    if name not in row:
        raise KeyError(f"the row has no column {name!r}; it has {', '.join(row) or 'none'}")
    return row[name]


def after(text: str, delimiter: str | None) -> str | None:
    """What follows the last delimiter, e.g. `</think>`; None where it does not occur."""
    if delimiter is None:
        return text
    return text.rpartition(delimiter)[2] if delimiter in text else None


@dataclass(frozen=True, kw_only=True)
class Exact(Rowwise):
    """1 where the answer is the row's, else 0. Numbers by value (1,000 = 1000.0 = $1000), text by letters alone."""

    column: str = "answer"
    pattern: str | None = None  # its last match is the answer (its first group, if it has one); None: all the text
    after: str | None = None  # only what follows the last of these counts, e.g. </think>

    @property
    def reads(self) -> tuple[str, ...]:
        """The gold answer."""
        return (self.column,)

    def load(self) -> None:
        """An error where the pattern is none."""
        re.compile(self.pattern or "")

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """A completion without an answer is wrong."""
        gold = column(row, self.column)
        if gold is None:
            return None
        answer = after(text, self.after)
        if answer is not None and self.pattern is not None:
            found = list(re.finditer(self.pattern, answer, re.MULTILINE))
            answer = found[-1][min(1, len(found[-1].groups()))] if found else None
        return float(answer is not None and plain(answer) == plain(str(gold)))


def plain(text: str) -> str | Decimal:
    """A number as its value; other text in lower case, with single spaces and without a full stop at the end."""
    words = " ".join(text.split()).rstrip(".").strip().casefold()
    digits = re.sub(r"(?<=\d),(?=\d{3})", "", words).removeprefix("$").removesuffix("%").strip()
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return words
    return number if number.is_finite() else words


@dataclass(frozen=True, kw_only=True)
class Format(Rowwise):
    """1 where the text matches a regular expression, else 0. `.` matches line ends too."""

    pattern: str
    match: Literal["whole", "anywhere"] = "whole"

    def load(self) -> None:
        """An error where the pattern is none."""
        re.compile(self.pattern)

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """Of the text, white space at its ends included."""
        find = re.fullmatch if self.match == "whole" else re.search
        return float(find(self.pattern, text, re.DOTALL | re.MULTILINE) is not None)


def tokens(ids: Sequence[int] | None) -> Sequence[int]:
    """The token ids; ValueError where the caller gave none."""
    if ids is None:
        raise ValueError("needs the completions' token ids")
    return ids


@dataclass(frozen=True, kw_only=True)
class Length(Rowwise):
    """Minus the distance from the wanted number of tokens, in multiples of it: 0 where it is kept, -1 at the worst."""

    target: Annotated[int, Ge(1)]
    wanted: Literal["at_most", "at_least", "near"] = "at_most"

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """max(-1, -|length - target| / target) on the side that is not wanted."""
        over = (len(tokens(ids)) - self.target) / self.target
        kept = (self.wanted == "at_most" and over <= 0) or (self.wanted == "at_least" and over >= 0)
        return 0.0 if kept else max(-1.0, -abs(over))


@dataclass(frozen=True, kw_only=True)
class Repetition(Rowwise):
    """-penalty x (1 - different n-grams / all n-grams), over token ids. Yeo et al. 2025, arXiv:2502.03373, C.2, in the
    form that TRL's `get_repetition_penalty_reward` gives it."""

    n: Annotated[int, Ge(1)] = 3
    penalty: Annotated[float, Gt(0)] = 1.0

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """0 for a completion of fewer than n tokens."""
        some = tokens(ids)
        grams = [tuple(some[i : i + self.n]) for i in range(len(some) - self.n + 1)]
        return -self.penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


@dataclass(frozen=True, kw_only=True)
class SoftOverlong(Rowwise):
    """0 up to max_length - cache tokens, then falling in a line to -1 at max_length, and -1 beyond. Yu et al. 2025
    (DAPO), arXiv:2503.14476, eq. 13."""

    max_length: Annotated[int, Ge(1)]
    cache: Annotated[int, Ge(0)]

    def reward(self, text: str, ids: Sequence[int] | None, row: dict[str, Any]) -> float | None:
        """Of the number of tokens alone."""
        over = len(tokens(ids)) - (self.max_length - self.cache)
        if over <= 0:
            return 0.0
        return max(-1.0, -over / self.cache) if self.cache else -1.0

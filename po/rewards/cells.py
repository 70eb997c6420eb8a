"""What one reward says of one completion: a number, that it does not apply (None), or why it failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["raised", "timeout", "died", "nan", "inf", "type", "count", "overlong"]
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids"}


@dataclass(frozen=True)
class Failure:
    """Why a completion has no number; the text is for a reader."""

    kind: Kind
    text: str


Cell = float | None | Failure


@dataclass(frozen=True)
class Call:
    """Completions to be rewarded, one entry of everything for each. `seconds` is how long it may take."""

    prompts: Sequence[Any]  # strings, or lists of messages
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seconds: float = math.inf

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, start: int, end: int | None = None) -> Call:
        """Some of the completions, in their order."""
        ids = None if self.completion_ids is None else self.completion_ids[start:end]
        columns = {k: v[start:end] for k, v in self.columns.items()}
        return replace(
            self,
            prompts=self.prompts[start:end],
            completions=self.completions[start:end],
            completion_ids=ids,
            columns=columns,
        )

    def arguments(self) -> dict[str, Any]:
        """What TRL gives a reward function: prompts, completions, their token ids, and every column of the rows."""
        columns = {k: v for k, v in self.columns.items() if k not in _RESERVED}
        ids = {} if self.completion_ids is None else {"completion_ids": self.completion_ids}
        return {"prompts": self.prompts, "completions": self.completions, **ids, **columns}


class Counted(list[Any]):
    """Values, and how often something happened on the way to them that is worth counting."""

    def __init__(self, values: Sequence[Any], counts: Mapping[str, int]) -> None:
        super().__init__(values)
        self.counts: Counter[str] = Counter(counts)


def failed(error: BaseException) -> Failure:
    """An exception as a failure."""
    kind: Kind = "timeout" if isinstance(error, TimeoutError) else "raised"
    return Failure(kind, f"{type(error).__name__}: {error}".removesuffix(": "))


def cell(value: Any) -> Cell:
    """One returned value. An exception instead of a value is the failure of that completion alone."""
    if value is None or isinstance(value, Failure):
        return value
    if isinstance(value, BaseException):
        return failed(value)
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return Failure("type", f"returned {shown(value)}; expected a number or None")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # e.g. a tensor of two numbers
        return Failure("type", f"returned {shown(value)}; expected a number or None")
    if math.isnan(number):
        return Failure("nan", "returned NaN; None says that a reward does not apply")
    if math.isinf(number):
        return Failure("inf", f"returned {number}")
    return number


def cells(output: Any, n: int) -> list[Cell]:
    """What a reward function returned for n completions; a wrong count fails all of them."""
    try:
        values = [output] if isinstance(output, str | bytes | Mapping) else list(output)
    except TypeError:
        return [Failure("type", f"returned {shown(output)}; expected a list of {n} numbers")] * n
    if len(values) != n or isinstance(output, str | bytes | Mapping):
        return [Failure("count", f"returned {len(values)} rewards for {n} completions")] * n
    return [cell(v) for v in values]


def shown(value: Any) -> str:
    """A value, cut to a few words."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def text_of(completion: Any) -> str:
    """The text of a completion: the string, or what the last assistant message of a conversation says."""
    if isinstance(completion, str):
        return completion
    said = [m.get("content") for m in completion if m.get("role", "assistant") == "assistant"]
    last = said[-1] if said else None
    if isinstance(last, list):  # content in parts
        return "".join(str(part.get("text") or "") for part in last)
    return str(last or "")

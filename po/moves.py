"""What the tables of other people's names say about one: where it went, or which head a loss is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Move:
    """Where a name went, how its value is written there, and what else the user should know."""

    path: str
    convert: Callable[[Any], Any] | None = None
    remark: str = ""


@dataclass(frozen=True)
class Loss:
    """A peer's loss as one of po's heads with the hyperparameters that make it the same, and where it still differs."""

    head: str
    fields: tuple[tuple[str, Any], ...] = ()
    differs: str = ""

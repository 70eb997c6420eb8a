"""What a reader of a dataset's own format has in hand: the record, the choices, and where to say what is wrong."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from po.data.facts import number
from po.data.messages import text
from po.data.report import NOTHING, Faults

Rule = Literal["sets", "zephyr", "argilla", "best-worst", "trl-unpaired"]
Bug = Literal["drop", "as-one", "keep"]


@dataclass(frozen=True)
class Choices:
    """What the formats leave open."""

    rule: Rule = "sets"
    score: Literal["overall", "mean"] = "overall"
    score_bug: Bug = "drop"
    attribute: str = "helpfulness"
    min_ratio: float = 2.0
    seed: int = 0


@dataclass
class Reading:
    """One record while it is read. A reader returns rows in a form that po.data reads, or why there is none."""

    data: Mapping[str, Any]
    choices: Choices
    faults: Faults
    counts: Counter[str] = field(default_factory=Counter)

    def text(self, name: str) -> str | None:
        """A text that is not empty, or None and a fault."""
        return text(self.data.get(name, NOTHING), name, self.faults)

    def number(self, name: str) -> float | None:
        """A finite number, or None and a fault."""
        return number(self.data.get(name, NOTHING), name, self.faults)

    def rest(self, *read: str) -> dict[str, Any]:
        """The fields that are kept as they are."""
        return {k: v for k, v in self.data.items() if k not in read}

    def draw(self) -> random.Random:
        """A generator that depends on the seed and the record's content, not on its place."""
        content = json.dumps(self.data, sort_keys=True, default=str)
        return random.Random(hashlib.sha256(f"{self.choices.seed} {content}".encode(errors="replace")).digest())


Made = list[dict[str, Any]] | str  # rows, or the reason why the record is dropped


@dataclass(frozen=True)
class Format:
    """A dataset's own format. `read` None: po.data reads it as it is."""

    name: str
    fields: str  # what it is recognised by, for messages
    detect: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Reading], Made] | None = None
    ranked: bool = False  # its ranks need --rank-order

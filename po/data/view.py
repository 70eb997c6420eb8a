"""A record while it is being converted: which of its fields were read, and the responses found in it, unchecked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from po.data.report import Faults
from po.data.wanted import NOTHING_MORE, Wanted
from po.spec import Source


@dataclass
class View:
    """A record's fields, which of them were read, and what is wrong with them. A null field is an absent one."""

    data: Mapping[str, Any]
    source: Source
    faults: Faults
    used: set[str] = dataclasses.field(default_factory=set)
    notes: list[str] = dataclasses.field(default_factory=list)  # what the detected format is called, most specific last
    wanted: Wanted = NOTHING_MORE

    def first(self, names: Sequence[str]) -> tuple[str, Any] | None:
        """The first of several names that has a value."""
        for name in names:
            if self.data.get(name) is not None:
                self.used.add(name)
                return name, self.data[name]
        return None

    def get(self, *names: str) -> Any:
        """The value under the first of several names that has one, else None."""
        found = self.first(names)
        return found and found[1]

    def has(self, names: Sequence[str]) -> bool:
        """Whether the record has one of the fields, be it null."""
        return any(name in self.data for name in names)


@dataclass
class Candidate:
    """A response as the record has it, unchecked. None: the record says nothing."""

    field: str  # how messages call it: "chosen", "responses[2]"
    value: Any
    reward: Any = None
    rank: Any = None
    label: Any = None
    logps: Any = None
    source: Any = None
    embedding: Any = None
    teacher: Any = None
    token_ids: Any = None
    ended: Any = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)  # what heads declare for responses and tokens
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # where the reward, rank, ... were found

    def at(self, fact: str) -> str:
        """The field that a message about a fact names."""
        return self.fields.get(fact, f"{self.field}.{fact}")

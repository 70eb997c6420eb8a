"""What the heads of a run read beyond responses, rewards and labels. What is not wanted is neither read from rows
nor kept nor put into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from po.spec import Term


@dataclass(frozen=True)
class Wanted:
    """The union of the heads' Needs of this kind."""

    columns: tuple[str, ...] = ()  # sorted
    embedding: bool = False
    prompt_embedding: bool = False
    teacher: bool = False
    logps: bool = False  # the sampler's, also in columns of their own beside the responses
    unlabelled: bool = False  # a label that is null says that the response is unlabelled
    differs: bool = False
    mismatch: bool = False
    row: bool = False
    prompts: bool = False  # rows are prompts for a sampler, with all their fields for reward functions

    def of_rows(self) -> dict[str, Any]:
        """The part that decides what is read from rows: what prepared rows depend on."""
        return {name: getattr(self, name) for name in _OF_ROWS}


NOTHING_MORE = Wanted()
_OF_ROWS = ("columns", "embedding", "prompt_embedding", "teacher", "logps", "unlabelled", "prompts")
_SAME = ("embedding", "prompt_embedding", "teacher", "differs", "mismatch", "row")


def wanted(terms: Sequence[Term]) -> Wanted:
    """What the heads of these terms want together."""
    needs = [term.head.needs for term in terms]
    return Wanted(
        columns=tuple(sorted({name for n in needs for name in n.columns})),
        logps=any(n.behaviour for n in needs),
        unlabelled=any(n.layout == "labelled" for n in needs),
        **{name: any(getattr(n, name) for n in needs) for name in _SAME},
    )

"""What the heads of a run read beyond responses, rewards and labels. What is not wanted is neither read from rows
nor kept nor put into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from po.errors import UserError
from po.heads import HEADS
from po.spec import Term
from po.types import Head


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
    privileged: bool = False  # the same responses after the row's privileged prompt
    response_columns: tuple[str, ...] = ()  # sorted
    token_columns: tuple[str, ...] = ()  # sorted
    single: bool = False  # a set may be one response with a reward
    unscored: bool = False  # a set may say nothing of how good its responses are; not for training
    prompts: bool = False  # rows are prompts for a sampler, with all their fields for reward functions

    @property
    def of_responses(self) -> tuple[str, ...]:
        """The columns of responses and of their tokens."""
        return (*self.response_columns, *self.token_columns)

    def of_rows(self) -> dict[str, Any]:
        """The part that decides what is read from rows: what prepared rows depend on."""
        return {name: getattr(self, name) for name in _OF_ROWS}


NOTHING_MORE = Wanted()
_COLUMNS = ("columns", "response_columns", "token_columns")
_OF_ROWS = (
    *_COLUMNS,
    "embedding",
    "prompt_embedding",
    "teacher",
    "logps",
    "unlabelled",
    "privileged",
    "single",
    "prompts",
)
_SAME = ("embedding", "prompt_embedding", "teacher", "differs", "mismatch", "row", "privileged")


def name_of(head: Head) -> str:
    """What a recipe calls a head."""
    return next((name for name, kind in HEADS.items() if kind is type(head)), type(head).__name__)


def wanted(terms: Sequence[Term]) -> Wanted:
    """What the heads of these terms want together. Raises UserError for two that want different streams."""
    needs = [term.head.needs for term in terms]
    for one, more in product(terms, terms):
        if one.head.needs.mismatch and more.head.needs.privileged:
            raise UserError(
                f"loss: head {name_of(one.head)!r} compares with responses to other prompts and head "
                f"{name_of(more.head)!r} with the same ones after a privileged prompt; one recipe can have one of them"
            )
    all_of: dict[str, Any] = {name: any(getattr(n, name) for n in needs) for name in _SAME}
    all_of |= {kind: tuple(sorted({name for n in needs for name in getattr(n, kind)})) for kind in _COLUMNS}
    sets = [n.single for n in needs if n.layout == "set"]
    all_of["single"] = bool(sets) and all(sets)
    return Wanted(
        logps=any(n.behaviour for n in needs), unlabelled=any(n.layout == "labelled" for n in needs), **all_of
    )

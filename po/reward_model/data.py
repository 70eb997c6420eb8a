"""Pairs for a reward model: po's rows, tokenized and checked as for a policy, and batches of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from po.data.groups import Group, Groups
from po.data.layout import arrange
from po.data.prepare import Prepared, prepare
from po.data.rows import Example, Item, Row
from po.data.store import light
from po.data.tokenize import Coded, Encoder, Ids
from po.data.wanted import Wanted
from po.errors import UserError
from po.policy import tokenizer_key
from po.reward_model.spec import BradleyTerry, Objective, Ordinal, RewardRecipe
from po.rewards.ordinal import Question
from po.spec import Source


class Questions(Encoder):
    """Rows as what an ordinal reward model is asked: of each response the question about it, what all share as prompt.

    So the rows' limits of length are those of the questions.
    """

    def __init__(self, tokenizer: Any, key: str, objective: Ordinal) -> None:
        super().__init__(tokenizer, key)
        self._question = Question(objective.template, objective.ratings, self, "objective")

    def __call__(self, row: Row) -> Coded:
        asked = [self._question(row.prompt, r.content) for r in row.responses]
        shared = min(_agree(asked[0], other) for other in asked[1:]) if len(asked) > 1 else len(asked[0]) - 1
        return Coded(asked[0][:shared], tuple(ids[shared:] for ids in asked), "", 0)

    def stops_at_end(self, ids: Sequence[int]) -> bool:
        """A question ends where the rating stands."""
        return True


def _agree(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)) - 1)


@dataclass(frozen=True)
class Pairs:
    """The rows of a run as pairs."""

    train: Groups
    eval: Groups | None
    prepared: tuple[Prepared, ...]
    lines: tuple[str, ...]  # what was read and derived, for people

    def to_json(self) -> dict[str, Any]:
        """The reports of what was read."""
        return {p.report.split: p.report.to_json() | {"key": p.key} for p in self.prepared}


def load_pairs(recipe: RewardRecipe, tokenizer: Any) -> Pairs:
    """Read, check, tokenize and pair the rows. Raises UserError for bad rows and for what the objective misses."""
    data, groups, prepared, lines = recipe.data, [], [], []
    for split, sources in (("train", data.train), ("eval", data.eval)):
        if sources:
            one = _prepare(recipe, sources, tokenizer, split)
            _check(one.examples, recipe.objective, sources[0].path)
            items, line = arrange(one.examples, "pair", data.pairing, data.pairing_margin, recipe.seed)
            groups.append(Groups(one.examples, items))
            _check_quality(groups[-1], recipe.objective, sources[0].path)
            prepared.append(one)
            lines += [one.report.summary(), line]
    return Pairs(groups[0], groups[1] if data.eval else None, tuple(prepared), tuple(lines))


def _prepare(recipe: RewardRecipe, sources: tuple[Source, ...], tokenizer: Any, split: str) -> Prepared:
    key, objective, wanted = tokenizer_key(tokenizer), recipe.objective, Wanted(columns=("strength",))
    if isinstance(objective, BradleyTerry):
        soft = ("preference",) if objective.soft_labels else ()
        margin = ("margin",) if objective.margin == "margin" else ()
        wanted = replace(wanted, columns=tuple(sorted({"strength", *soft, *margin})))
        return prepare(recipe.data, sources, tokenizer, key, split, wanted)
    if objective.quality != "none":
        wanted = replace(wanted, response_columns=("quality",))
    asked = hashlib.sha256(json.dumps([key, objective.template, objective.ratings]).encode()).hexdigest()
    return prepare(recipe.data, sources, tokenizer, asked, split, wanted, partial(Questions, objective=objective))


def column(example: Example, name: str) -> float | None:
    """A number of the row, None where it has none."""
    return dict(example.columns).get(name)


def quality(example: Example, item: Item) -> tuple[float, float]:
    """The levels of the two answers, 0 where the row names none."""
    levels = dict(example.response_columns).get("quality")
    return (0.0, 0.0) if levels is None else (levels[item.responses[0]], levels[item.responses[1]])


def _check(examples: Sequence[Example], objective: Objective, where: str) -> None:
    """The numbers that the objective reads are there and make sense."""
    for e in light(examples):
        if not e.is_pair and e.reward is None and e.label is None:
            raise UserError(f"{where}: {e.where}: expected two answers with a preference, or answers with rewards")
        if not isinstance(objective, BradleyTerry):
            continue
        if not e.is_pair and (objective.margin != "none" or objective.soft_labels):
            raise UserError(
                f"{where}: {e.where}: margins and soft labels are those of a pair, and this row is a set; "
                "data_prep/pair.py makes pairs of it"
            )
        if objective.margin != "none" and column(e, objective.margin) is None:
            raise UserError(
                f"{where}: {e.where}: expected a number in column {objective.margin!r}, found none; "
                f"objective.margin reads it. Add it to the rows, or write `margin: none`"
            )
        p = column(e, "preference") if objective.soft_labels else None
        if p is not None and not 0 <= p <= 1:
            raise UserError(f"{where}: {e.where}: preference: expected a probability from 0 to 1, got {p:g}")


def _check_quality(groups: Groups, objective: Objective, where: str) -> None:
    if not isinstance(objective, Ordinal) or objective.quality == "none":
        return
    examples = light(groups.examples)
    for item in groups.items:
        example = examples[item.example]
        chosen, rejected = quality(example, item)
        if not {chosen, rejected} <= set(range(objective.levels + 1)):
            raise UserError(
                f"{where}: {example.where}: quality: expected whole numbers from 1 (worst) to {objective.levels}, got "
                f"{chosen:g} and {rejected:g}"
            )
        if chosen < rejected and chosen:
            raise UserError(
                f"{where}: {example.where}: quality: the chosen answer is of level {chosen:g} and the rejected one of "
                f"{rejected:g}; mend the row, or leave `quality` out of it"
            )


@dataclass(frozen=True)
class Batch:
    """N pairs as 2N sequences: all chosen ones, then all rejected ones."""

    ids: tuple[str, ...]  # the rows
    items: tuple[Item, ...]
    sequences: tuple[Ids, ...]
    counts_N: Tensor  # bool, False: a filler that keeps ranks in step
    margin_N: Tensor | None = None
    preference_N: Tensor | None = None
    quality_2N: Tensor | None = None

    def to(self, device: Any) -> Batch:
        """On a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Collate:
    """Pairs to a batch."""

    objective: Objective

    def __call__(self, groups: Sequence[Group]) -> Batch:
        numbers: dict[str, Tensor] = {}
        o = self.objective
        if isinstance(o, BradleyTerry) and o.margin != "none":
            numbers["margin_N"] = _column(groups, o.margin, 0.0)
        if isinstance(o, BradleyTerry) and o.soft_labels:
            numbers["preference_N"] = _column(groups, "preference", 1.0)
        if isinstance(o, Ordinal) and o.quality != "none":
            both = [quality(g.example, g.item) for g in groups]
            numbers["quality_2N"] = torch.tensor([*(c for c, _ in both), *(r for _, r in both)])
        return Batch(
            ids=tuple(g.example.id for g in groups),
            items=tuple(g.item for g in groups),
            sequences=tuple(_sequence(g, side) for side in (0, 1) for g in groups),
            counts_N=torch.tensor([g.counts for g in groups]),
            **numbers,
        )


def _column(groups: Sequence[Group], name: str, default: float) -> Tensor:
    found = [column(g.example, name) for g in groups]
    return torch.tensor([default if x is None else x for x in found], dtype=torch.float32)


def _sequence(group: Group, side: int) -> Ids:
    example = group.example
    return tuple(example.prompt_ids) + tuple(example.response_ids[group.item.responses[side]])


def strengths(groups: Groups) -> list[float | None]:
    """Each pair's `strength`, where its row is that pair and has one."""
    examples = light(groups.examples)
    rows = (examples[i.example] for i in groups.items)
    return [column(e, "strength") if e.is_pair else None for e in rows]


def facts(recipe: RewardRecipe) -> Mapping[str, Any]:
    """The part of a recipe that decides what a row weighs in the loss."""
    return {"objective": repr(recipe.objective), "lora": repr(recipe.lora), "seed": recipe.seed}

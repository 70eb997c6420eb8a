"""A recipe's rows, read and checked, as groups that can be batched; or as prompts that can be sampled from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from po.batch import Groups, wanted
from po.data.layout import arrange, check_needs
from po.data.prepare import Prepared, prepare
from po.data.rows import Item
from po.policy import tokenizer_key
from po.spec import DataSpec, Recipe, RolloutSpec
from po.types import Layout


@dataclass(frozen=True)
class Data:
    """The rows of a run, ready to be batched."""

    train: Groups
    eval: Groups | None
    layout: Layout
    prepared: tuple[Prepared, ...]
    lines: tuple[str, ...]  # what was read and derived, for people

    def to_json(self) -> dict[str, Any]:
        """The reports of what was read, for data_report.json."""
        return {p.report.split: p.report.to_json() | {"key": p.key} for p in self.prepared}


def load_data(recipe: Recipe, tokenizer: Any) -> Data:
    """Rows -> groups in the layout that the recipe's heads need. Raises UserError for bad rows and unmet needs."""
    if recipe.rollout is not None:
        return _load_prompts(recipe, recipe.rollout, tokenizer)
    key, spec, more = tokenizer_key(tokenizer), recipe.data, wanted(recipe.loss)
    train = prepare(spec, spec.train, tokenizer, key, "train", more)
    prepared = [train]
    layout = check_needs(recipe.loss, train.examples, spec.train[0].path)
    groups, lines = [], []
    if spec.eval:
        prepared.append(prepare(spec, spec.eval, tokenizer, key, "eval", more))
        check_needs(recipe.loss, prepared[1].examples, spec.eval[0].path)
    for p in prepared:
        items, line = arrange(p.examples, layout, spec.pairing, spec.pairing_margin, recipe.seed, more.mismatch)
        groups.append(Groups(p.examples, items))
        lines += [p.report.summary(), line]
    return Data(groups[0], groups[1] if spec.eval else None, layout, tuple(prepared), tuple(lines))


def _load_prompts(recipe: Recipe, rollout: RolloutSpec, tokenizer: Any) -> Data:
    """Rows of which only the prompts are trained on; their other fields are for rewards."""
    key, more = tokenizer_key(tokenizer), replace(wanted(recipe.loss), prompts=True)
    room = recipe.data.max_length - rollout.max_completion_length
    spec = replace(recipe.data, max_prompt_length=min(room, recipe.data.max_prompt_length or room))
    prepared = [prepare(spec, spec.train, tokenizer, key, "train", more)]
    if spec.eval:
        prepared.append(prepare(spec, spec.eval, tokenizer, key, "eval", more))
    given = ("consistency",) if rollout.consistency else ()
    layouts = [
        check_needs(recipe.loss, p.examples, where, sampled=True, given=given)
        for p, where in zip(prepared, _paths(spec))
    ]
    groups = [Groups(p.examples, [Item(i, ()) for i in range(len(p.examples))]) for p in prepared]
    lines = [
        line for p, g in zip(prepared, groups) for line in (p.report.summary(), f"{len(g)} prompts to sample from")
    ]
    return Data(groups[0], groups[1] if spec.eval else None, layouts[0], tuple(prepared), tuple(lines))


def _paths(spec: DataSpec) -> tuple[str, ...]:
    return tuple(sources[0].path for sources in (spec.train, spec.eval) if sources)

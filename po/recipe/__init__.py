"""A recipe: YAML in, frozen dataclasses out, with everything that is wrong in one report before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from po.ambiguous import no_such
from po.heads import HEADS
from po.recipe import overrides as command_line
from po.recipe import text
from po.recipe.arguments import defaults, keep_checkpoints, training_arguments
from po.recipe.checks import check
from po.recipe.fields import MisfitError, fit, hints, parse, shown, unknown
from po.recipe.report import Report
from po.recipe.resolve import resolved, resolved_text
from po.recipe.schema import schema
from po.recipe.sections import data_section, find_redacted, lora_section, scalars, section, train_section
from po.recipe.translate import canonical
from po.spec import DataSpec, ModelSpec, Recipe, ReferenceSpec, RewardSpec, RolloutSpec, Source, Term

__all__ = ["keep_checkpoints", "load", "resolved", "resolved_text", "schema", "training_arguments"]

_REQUIRED = {
    "model": "a folder or a hub name, e.g. `model: Qwen/Qwen2.5-0.5B-Instruct`",
    "data": "the rows, e.g. `data: {train: pairs.jsonl}`",
    "loss": "a head, e.g. `loss: {head: dpo, beta: 0.1}`; `po heads` lists them",
    "output_dir": "the run's folder, e.g. `output_dir: runs/first`",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """The recipe of a file with `key=value` overrides, and notes on what was translated or will have no effect.

    Every value is checked and coerced, and `train` holds every field of TrainingArguments that po passes on. Raises
    UserError with all problems of the recipe, each with its place, what was found, what was expected, what to do.
    """
    report = Report(str(path))
    said = canonical(text.read(path), report)
    for word in overrides:
        command_line.apply(said, word, report)
    recipe = check(_build(said, report), said, report)
    report.stop()
    return recipe, report.notes


def _build(said: Mapping[str, Any], report: Report) -> Recipe:
    """The dataclasses of a canonical tree, with a stand-in for each section that `report.broken` names."""
    find_redacted(said, (), report)
    for key, example in _REQUIRED.items():
        if said.get(key) is None:
            report.wrong((key,), f"is missing; expected {example}.")
    model = section(ModelSpec, said, "model", report) or ModelSpec("?")
    data = data_section(said["data"], report) if said.get("data") is not None else None
    terms = [_term(raw, ("loss", i), report) for i, raw in enumerate(said.get("loss") or [])]
    if said.get("loss") == []:
        report.wrong(("loss",), f"is empty; expected {_REQUIRED['loss']}.")
    lora = lora_section(said.get("lora"), report)
    reference = _reference(said, report) or ReferenceSpec()
    train = train_section(said.get("train"), report)
    data = data or DataSpec(train=(Source("?"),))
    return Recipe(
        model=model,
        lora=lora,
        reference=reference,
        data=data,
        rollout=_rollout(said.get("rollout"), report),
        loss=tuple(t for t in terms if t is not None),
        train=defaults(lora is not None or model.adapter is not None, bool(data.eval)) | train,
        **({"output_dir": "?"} | scalars(said, report)),
    )


def _reference(tree: Mapping[str, Any], report: Report) -> ReferenceSpec | None:
    raw = tree.get("reference", {})
    if raw is None:
        report.wrong(("reference",), "is empty; expected init, base, none or a path, e.g. `reference: init`.")
        return None
    return parse(ReferenceSpec, raw, ("reference",), report, {"from": "source"})


def _rollout(raw: Any, report: Report) -> RolloutSpec | None:
    if raw is None or not isinstance(raw, Mapping):
        return None if raw is None else parse(RolloutSpec, raw, ("rollout",), report)
    at = ("rollout", "rewards")
    found = [parse(RewardSpec, one, (*at, i), report) for i, one in enumerate(raw.get("rewards") or [])]
    return parse(RolloutSpec, {**raw, "rewards": tuple(r for r in found if r is not None)}, ("rollout",), report)


def _term(raw: Any, at: text.Keys, report: Report) -> Term | None:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("head"), str):
        report.wrong(at, f"expected a head and its hyperparameters, e.g. {{head: dpo, beta: 0.1}}, got {shown(raw)}.")
        return None
    rest = {k: v for k, v in raw.items() if k not in ("head", "weight")}
    name = raw["head"]
    if name not in HEADS:
        report.wrong((*at, "head"), no_such(name))
        return None
    weight = 1.0
    try:
        weight = fit(hints(Term)["weight"], raw.get("weight", Term.weight))
    except MisfitError as e:
        report.wrong((*at, "weight"), str(e))
    names = list(hints(HEADS[name]))
    for key in [k for k in rest if k not in names]:
        unknown(key, [*names, "weight"], at, report, f"head {name!r} has no such hyperparameter")
        del rest[key]
    head = parse(HEADS[name], rest, at, report)
    return None if head is None else Term(head, weight)

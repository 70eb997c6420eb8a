"""A recipe: YAML in, frozen dataclasses out, with everything that is wrong in one report before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from po.ambiguous import no_such
from po.heads import HEADS
from po.recipe import overrides as command_line
from po.recipe import text
from po.recipe.arguments import check as check_train
from po.recipe.arguments import defaults, keep_checkpoints, training_arguments
from po.recipe.checks import check
from po.recipe.fields import MisfitError, fit, hints, parse, shown, unknown
from po.recipe.report import Report
from po.recipe.resolve import REDACTED, resolved, resolved_text
from po.recipe.schema import schema
from po.recipe.translate import canonical
from po.spec import DataSpec, LoraSpec, ModelSpec, Recipe, ReferenceSpec, RewardSpec, RolloutSpec, Source, Term

__all__ = ["keep_checkpoints", "load", "resolved", "resolved_text", "schema", "training_arguments"]

T = TypeVar("T")

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
    _find_redacted(said, (), report)
    for key, example in _REQUIRED.items():
        if said.get(key) is None:
            report.wrong((key,), f"is missing; expected {example}.")
    model = _section(ModelSpec, said, "model", report) or ModelSpec("?")
    data = _data(said["data"], report) if said.get("data") is not None else None
    terms = [_term(raw, ("loss", i), report) for i, raw in enumerate(said.get("loss") or [])]
    if said.get("loss") == []:
        report.wrong(("loss",), f"is empty; expected {_REQUIRED['loss']}.")
    lora = _lora(said.get("lora"), report)
    reference = _reference(said, report) or ReferenceSpec()
    train = _train(said.get("train"), report)
    data = data or DataSpec(train=(Source("?"),))
    return Recipe(
        model=model,
        lora=lora,
        reference=reference,
        data=data,
        rollout=_rollout(said.get("rollout"), report),
        loss=tuple(t for t in terms if t is not None),
        train=defaults(lora is not None or model.adapter is not None, bool(data.eval)) | train,
        **({"output_dir": "?"} | _scalars(said, report)),
    )


def _section(cls: type[T], said: Mapping[str, Any], key: str, report: Report) -> T | None:
    return None if said.get(key) is None else parse(cls, said[key], (key,), report)


def _scalars(said: Mapping[str, Any], report: Report) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key in ("output_dir", "deepspeed", "max_tokens_per_forward", "resume", "seed"):
        if said.get(key) is not None:
            try:
                out[key] = fit(hints(Recipe)[key], said[key])
            except MisfitError as e:
                report.wrong((key,), str(e))
    return out


def _lora(raw: Any, report: Report) -> LoraSpec | None:
    if raw is True:
        report.wrong(("lora",), "expected a mapping, got true; write e.g. `lora: {r: 16, alpha: 32}`, or `lora: {}`.")
        return None
    return None if raw is None else parse(LoraSpec, raw, ("lora",), report)


def _reference(tree: Mapping[str, Any], report: Report) -> ReferenceSpec | None:
    raw = tree.get("reference", {})
    if raw is None:
        report.wrong(("reference",), "is empty; expected init, base, none or a path, e.g. `reference: init`.")
        return None
    return parse(ReferenceSpec, raw, ("reference",), report, {"from": "source"})


def _data(raw: Any, report: Report) -> DataSpec | None:
    if not isinstance(raw, Mapping):
        return parse(DataSpec, raw, ("data",), report)
    sources = {}
    for split in ("train", "eval"):
        found = [parse(Source, s, ("data", split, i), report) for i, s in enumerate(raw.get(split) or [])]
        sources[split] = tuple(s for s in found if s is not None)
    if not raw.get("train"):
        report.wrong(
            ("data", "train"), "is missing; expected a file, a folder or a hub name, e.g. `train: pairs.jsonl`."
        )
    spec = parse(DataSpec, {**raw, **sources}, ("data",), report)
    return spec if spec is not None and spec.train else None


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


def _train(raw: Any, report: Report) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        report.wrong(("train",), f"expected a mapping, e.g. {{learning_rate: 1e-6}}, got {shown(raw)}")
        return {}
    return check_train(raw, report)


def _find_redacted(node: Any, at: text.Keys, report: Report) -> None:
    """A resolved recipe has its secrets taken out; they must come back before it can run."""
    if node == REDACTED:
        report.wrong(at, "was taken out when the recipe was saved; give it again.")
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ():
        _find_redacted(value, (*at, key), report)

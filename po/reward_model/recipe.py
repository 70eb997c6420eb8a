"""YAML -> RewardRecipe, as strict as a policy's recipe: everything that is wrong in one report, with suggestions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from po.recipe import overrides, text
from po.recipe.arguments import defaults
from po.recipe.checks import check_shared
from po.recipe.fields import hints, parse, shown, unknown
from po.recipe.report import Report
from po.recipe.resolve import plain
from po.recipe.sections import data_section, find_redacted, lora_section, scalars, section, train_section
from po.recipe.translate import expand
from po.reward_model.spec import OBJECTIVES, BradleyTerry, Ensemble, Objective, Ordinal, RewardRecipe
from po.spec import DataSpec, ModelSpec, Source
from po.zero import stage

KEYS = tuple(hints(RewardRecipe))
_MAX_LENGTH = 1024  # TRL's for reward models
_RATES = {True: 1e-4, False: 5e-6}  # learning rates with LoRA (TRL's) and of all weights (Secrets of RLHF, part II)
_REQUIRED = {
    "model": "a folder or a hub name, e.g. `model: Qwen/Qwen2.5-0.5B-Instruct`",
    "data": "the pairs, e.g. `data: {train: pairs.jsonl}`",
    "output_dir": "the run's folder, e.g. `output_dir: runs/reward`",
}
_HEAD = "# Every value of the run, defaults included. `po reward train` on this file makes the same run.\n"


def load(path: str | Path, words: Sequence[str] = ()) -> tuple[RewardRecipe, list[str]]:
    """The recipe of a file with `key=value` overrides, and notes. UserError with all that is wrong with it."""
    report = Report(str(path))
    said = text.read(path)
    for key in [k for k in said if k not in KEYS]:
        unknown(key, KEYS, (), report)
        del said[key]
    if isinstance(said.get("objective"), str):
        said["objective"] = {"kind": said["objective"]}
    expand(said, report)
    for word in words:
        overrides.apply(said, word, report, KEYS)
    recipe = _build(said, report)
    check_shared(recipe.plain, said, report)
    _check(recipe, report)
    report.stop()
    return recipe, report.notes


def resolved_text(recipe: RewardRecipe) -> str:
    """The text of recipe.resolved.yaml, secrets taken out."""
    tree = asdict(recipe) | {"objective": {"kind": recipe.kind, **asdict(recipe.objective)}}
    return _HEAD + text.dump({k: plain(v, k) for k, v in tree.items()})


def _build(said: dict[str, Any], report: Report) -> RewardRecipe:
    find_redacted(said, (), report)
    for key, example in _REQUIRED.items():
        if said.get(key) is None:
            report.wrong((key,), f"is missing; expected {example}.")
    if isinstance(said.get("data"), dict):
        said["data"].setdefault("max_length", _MAX_LENGTH)
    data = data_section(said["data"], report) if said.get("data") is not None else None
    data = data or DataSpec(train=(Source("?"),))
    lora = lora_section(said.get("lora"), report)
    train = train_section(said.get("train"), report)
    rate = {"learning_rate": _RATES[lora is not None]}
    return RewardRecipe(
        model=section(ModelSpec, said, "model", report) or ModelSpec("?"),
        data=data,
        objective=_objective(said.get("objective"), report),
        lora=lora,
        ensemble=section(Ensemble, said, "ensemble", report) or Ensemble(),
        train=defaults(lora is not None, bool(data.eval)) | rate | train,
        **({"output_dir": "?"} | scalars(said, report)),
    )


def _objective(raw: Any, report: Report) -> Objective:
    raw = {"kind": "bradley_terry"} if raw is None else raw
    kinds = ", ".join(OBJECTIVES)
    if not isinstance(raw, Mapping) or raw.get("kind", "bradley_terry") not in OBJECTIVES:
        report.wrong(("objective",), f"expected a mapping with `kind` ({kinds}), got {shown(raw)}.")
        return BradleyTerry()
    cls = OBJECTIVES[raw.get("kind", "bradley_terry")]
    rest = {k: v for k, v in raw.items() if k != "kind"}
    names = list(hints(cls))
    for key in [k for k in rest if k not in names]:
        unknown(key, ["kind", *names], ("objective",), report, "the objective has no such key")
        del rest[key]
    found: Objective | None = parse(cls, rest, ("objective",), report)
    return found or cls()


def _check(recipe: RewardRecipe, report: Report) -> None:
    """What no single field can say."""
    model, objective = recipe.model, recipe.objective
    for name, why in (
        ("load_in_4bit", "4-bit weights cannot be merged into the model that scores"),
        ("adapter", "a reward model starts from whole weights; merge the adapter first (`po export RUN --merged`)"),
        ("trust_remote_code", "reward models are scored without running a model folder's code"),
    ):
        if getattr(model, name):
            report.wrong(("model", name), f"does not go with a reward model: {why}.")
    if model.share_prefix is True:
        report.wrong(("model", "share_prefix"), "a reward model computes each answer with its prompt; leave it out.")
    if recipe.lora is not None and "deepspeed" not in report.broken and stage(recipe.deepspeed) == 3:
        report.wrong(
            ("lora",), "does not work under ZeRO-3, where the score could not be trained beside it; use zero2."
        )
    if isinstance(objective, BradleyTerry):
        _check_contrastive(objective, report)
    elif recipe.data.overlong not in ("drop", "error"):
        report.wrong(("data", "overlong"), "the question of `ordinal` cannot be cut: write drop or error.")
    if isinstance(objective, Ordinal) and objective.quality != "none" and len(objective.ratings) < 2 * objective.levels:
        few = f"is {objective.levels}; with {len(objective.ratings)} ratings there are not two for each level."
        report.wrong(("objective", "levels"), few)


def _check_contrastive(objective: BradleyTerry, report: Report) -> None:
    if objective.contrastive and not objective.dropout:
        report.wrong(("objective", "dropout"), "is 0, and `contrastive` compares two passes that dropout makes differ.")
    for name in ("temperature", "features"):
        if not objective.contrastive and getattr(objective, name) != getattr(BradleyTerry, name):
            report.wrong(("objective", name), "has no effect without `contrastive`.")

"""TRL's GRPO losses in po's terms: loss_type, beta and the level say together which head it is, and its clip is said by
names that need each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from po.heads import HEADS
from po.recipe.fields import shown
from po.recipe.losses import OFF
from po.recipe.report import Report

CLIP = ("epsilon", "epsilon_high", "delta", "scale_rewards", "importance_sampling_level")
FAMILY = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
_DELTA = ("grpo", "grpo_kl", "dapo", "dr_grpo")  # heads; another one's delta is something else

Said = dict[str, tuple[str, Any]]


def head(said: Said, raw: Mapping[str, Any], report: Report) -> bool:
    """Whether loss_type is one of TRL's for GRPO; then `said` has the name under which `LOSSES` knows it."""
    key, name = said.get("type", ("", None))
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if name not in FAMILY:
        return False
    if key == "rl":
        report.wrong((key,), f"axolotl's {name} is TRL's trainer; write the loss itself, e.g. `loss_type: dapo`.")
    level = raw.get("importance_sampling_level")
    if level == "sequence" and name == "grpo":
        said["type"] = (key, "gspo")
    elif level is not None and (level == "sequence") != (name == "luspo"):
        report.wrong(
            ("importance_sampling_level",),
            f"cannot be translated: with {name!r} po has no head for the level {shown(level)}; `sequence` is for grpo "
            "(head 'gspo') and luspo.",
        )
    if said.get("beta", ("", 0))[1] in OFF:
        said.pop("beta", None)
    elif said["type"][1] == "grpo":
        said["type"] = (key, "grpo_kl")
    else:
        report.wrong(
            (said.pop("beta")[0],),
            f"cannot be translated: of po's heads only 'grpo_kl' has GRPO's KL term, not {name!r}.",
        )
    if name == "dr_grpo" and raw.get("scale_rewards") in (True, "group"):
        report.wrong(
            ("scale_rewards",), "cannot be translated: Dr. GRPO does not scale; write none, or `loss_type: dapo`."
        )
    return True


def clip(terms: list[Any], raw: Mapping[str, Any], theirs: bool, report: Report, replace: bool = False) -> None:
    """epsilon, epsilon_high, delta, scale_rewards into the terms. theirs: the loss is named as TRL does, so that what
    it leaves out has TRL's values, where po's are others."""
    given = {k: raw[k] for k in CLIP if raw.get(k) is not None}
    taken: set[str] = {"importance_sampling_level"} if theirs or given.get(CLIP[-1]) == "token" else set()
    for i, term in enumerate(terms):
        name = term.get("head") if isinstance(term, dict) else None
        for field, (key, value) in _fields(name, given, theirs, report).items():
            taken.add(key)
            if field in term and not replace and key:
                report.wrong(
                    (key,), f"is another name of loss[{i}].{field}, which the recipe gives as well; keep one of them."
                )
                continue
            term[field] = value
            report.origin["loss", i, field] = f"given as {key}" if key else "TRL's default"
            report.note(f"{key or 'loss_type'}: translated to loss[{i}].{field}: {shown(value)}")
        if theirs and name == "dr_grpo" and raw.get("max_completion_length") is not None:
            term["max_completion_length"] = raw["max_completion_length"]
    heads = ", ".join(str(t.get("head") if isinstance(t, dict) else t) for t in terms)
    for key in given.keys() - taken:
        if theirs and _nothing(key, given[key]):
            report.note(f"{key}: {shown(given[key])} asks for nothing and is left out")
        else:
            report.wrong((key,), f"no head of the recipe ({heads}) has such a hyperparameter of GRPO's.")


def _fields(name: Any, given: Mapping[str, Any], theirs: bool, report: Report) -> dict[str, tuple[str, Any]]:
    """A head's field: (the name it was given by, "" for TRL's default; the value)."""
    out: dict[str, tuple[str, Any]] = {}
    has = {f.name for f in fields(HEADS[name])} if isinstance(name, str) and name in HEADS else set()  # type: ignore[arg-type]  # a dataclass
    low = "epsilon" if "epsilon" in given else ""
    high = "epsilon_high" if "epsilon_high" in given else low
    largest = given.get("epsilon_high", given.get("epsilon", 0.2))
    if name != "cispo" and {"epsilon_low", "epsilon_high"} <= has:
        if low or theirs:
            out["epsilon_low"] = (low, given.get("epsilon", 0.2))
        if high or theirs:
            out["epsilon_high"] = (high, largest)
    elif name == "cispo" and (high == "epsilon_high" or theirs):
        cap = largest
        if isinstance(cap, int | float) and cap <= 1:
            report.wrong(
                ("epsilon_high",), f"is {shown(cap)}; TRL's cispo caps the weight itself there; expected e.g. 5.0."
            )
        elif isinstance(cap, int | float):
            out["epsilon_high"] = (high, cap - 1)  # TRL's is the largest weight, po's how far above 1 it lies
            report.note(f"epsilon_high: TRL's cap {shown(cap)} of the weight is epsilon_high {shown(cap - 1)} in po")
    if name in _DELTA and "delta" in given:
        out["delta"] = ("delta", given["delta"])
    if "scale" in has and "scale_rewards" in given:
        known = (("unbiased", (True, "group")), ("none", (False, "none")))
        scale = next((ours for ours, values in known if given["scale_rewards"] in values), None)
        if scale is None:
            report.wrong(
                ("scale_rewards",),
                f"cannot be translated: po scales within a prompt's samples or not at all, got "
                f"{shown(given['scale_rewards'])}.",
            )
        else:
            out["scale"] = ("scale_rewards", scale)
    return out


def _nothing(key: str, value: Any) -> bool:
    """Whether it is what a dump of TRL's configuration holds anyway, or what the head does anyway."""
    harmless: dict[str, tuple[Any, ...]] = {
        "epsilon": (0.2,),
        "scale_rewards": (True, "group", False, "none"),
        "importance_sampling_level": ("token",),
    }
    return value in harmless.get(key, ())

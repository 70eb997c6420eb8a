"""The loss as peers say it: their names and hyperparameters, flat or in a list, as terms of `loss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from po.aliases import HARMLESS, HYPERPARAMETERS, LOSSES, SMOOTHING
from po.heads import HEADS
from po.recipe.fields import shown
from po.recipe.report import Report
from po.recipe.text import Keys, show

Tree = dict[str, Any]
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return list(value) if isinstance(value, list) else [value]


def term(raw: Any, at: Keys, report: Report) -> Any:
    """A term with our names: 'dpo' -> {head: dpo}, {type: ipo, beta: 0.1} -> {head: ipo, tau: 0.1}."""
    if isinstance(raw, str):
        raw = {"head": raw}
    if not isinstance(raw, dict):
        return raw
    out = {("head" if k in ("type", "name", "loss_type") and "head" not in raw else k): v for k, v in raw.items()}
    if isinstance(out.get("head"), str) and out["head"] not in HEADS:
        out = peers_head(out, at, report)
    return _hyperparameters(out, at, report)


def peers_head(raw: Tree, at: Keys, report: Report) -> Tree:
    """A peer's loss as a head, with the hyperparameters that make it the same; unknown names stay, to be reported."""
    loss = LOSSES.get(str(raw.get("head")))
    if loss is None:
        return raw
    differs = f". {loss.differs}" if loss.differs else ""
    if loss.head == "dpo" and raw.get("label_smoothing"):
        report.note(f"{show(at)}.label_smoothing: {SMOOTHING}")
    report.note(f"{show(at)}: the loss {raw['head']!r} is po's head {loss.head!r}{differs}")
    return dict(loss.fields) | raw | {"head": loss.head}


def _hyperparameters(raw: Tree, at: Keys, report: Report) -> Tree:
    out: Tree = {}
    for key, value in raw.items():
        move = HYPERPARAMETERS.get((str(raw.get("head")), key))
        if move is None:
            out[key] = value
            continue
        if move.path in raw:
            report.wrong(
                (*at, key), f"is another name of {move.path}, which the recipe gives as well; keep one of them."
            )
            continue
        number = isinstance(value, int | float) and value != 0
        out[move.path] = move.convert(value) if move.convert and number else value
        report.origin[(*at, move.path)] = f"given as {key}"
        remark = f" ({move.remark})" if move.remark else ""
        report.note(f"{show((*at, key))}: translated to {move.path}: {shown(out[move.path])}{remark}")
    return out


def flat(tree: Tree, said: Mapping[str, tuple[str, Any]], report: Report) -> None:
    """Flat names (loss_type, loss_weights, beta, label_smoothing, an SFT coefficient) written into `loss`."""
    if "type" in said:
        key, names = said["type"]
        if tree.get("loss") is not None:
            report.wrong((key,), "is another name of `loss`, which the recipe gives as well; keep one of them.")
            return
        tree["loss"] = [peers_head({"head": n}, ("loss", i), report) for i, n in enumerate(listed(names))]
        report.origin[("loss",)] = f"given as {key}: {shown(names)}"
    elif said and tree.get("loss") is None:
        tree["loss"] = [{"head": "dpo"}]
        report.note("loss: the recipe names none; peers' default, po's head 'dpo', is taken")
    if "weights" in said:
        _weights(tree["loss"], *said["weights"], report)
    for name in said.keys() - {"type", "weights", "sft"}:
        spread(tree["loss"], name, *said[name], report)
    if "sft" in said and said["sft"][1] not in OFF:
        key, weight = said["sft"]
        tree["loss"].append({"head": "sft", "weight": weight})
        report.note(
            f"{key}: translated to a second term of the loss, {{head: sft, weight: {shown(weight)}}}. po averages over "
            "all tokens of the step; the peers average over each response's tokens first"
        )


def _weights(terms: list[Any], key: str, weights: Any, report: Report) -> None:
    if weights is None:
        return
    if len(listed(weights)) != len(terms):
        report.wrong((key,), f"expected a weight for each of the {len(terms)} terms of the loss, got {shown(weights)}.")
        return
    for one, weight in zip(terms, listed(weights), strict=True):
        one["weight"] = weight
    report.note(f"{key}: translated to the terms' `weight`")


def spread(terms: list[Any], name: str, key: str, value: Any, report: Report, replace: bool = False) -> None:
    """A flat hyperparameter to every term whose head has it, under that head's name for it."""
    heads = [t.get("head") if isinstance(t, dict) else None for t in terms]
    taken = False
    for i, head in enumerate(heads):
        if not isinstance(head, str) or head not in HEADS:
            return  # reported where heads are parsed
        move = HYPERPARAMETERS.get((head, name))
        own = move.path if move else name
        if own not in {f.name for f in fields(HEADS[head])}:  # type: ignore[arg-type]  # a dataclass
            continue
        taken = True
        if own in terms[i] and not replace:
            report.wrong(
                (key,), f"is another name of loss[{i}].{own}, which the recipe gives as well; keep one of them."
            )
            continue
        terms[i][own] = value
        report.origin["loss", i, own] = f"given as {key}"
        smooths = own == "label_smoothing" and value not in OFF
        report.note(f"{key}: translated to loss[{i}].{own}: {shown(value)}" + (f". {SMOOTHING}" if smooths else ""))
    silent = () if name == "beta" else (*OFF, *HARMLESS.get(key, ()))
    if not taken and value not in silent:
        report.wrong((key,), f"no head of the recipe ({', '.join(map(str, heads))}) has a hyperparameter {name!r}.")

"""From a recipe as people write it to one in po's own terms: shorthands written out, peers' names moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from po.aliases import DROPPED, HARMLESS, LOSS_KEYS, MOVED, REFUSED
from po.errors import suggest
from po.moves import Move
from po.recipe import arguments, grpo, grpo_loss, losses, peers
from po.recipe.fields import hints, shown
from po.recipe.losses import OFF, Tree, listed
from po.recipe.report import Report
from po.recipe.text import Keys, show
from po.spec import DataSpec, LoraSpec, ModelSpec, Recipe, RolloutSpec

KEYS = tuple(hints(Recipe))
HANDLERS = {**peers.HANDLERS, **grpo.HANDLERS}
SECTIONS: dict[str, tuple[str, ...]] = {
    "model": tuple(hints(ModelSpec)),
    "lora": tuple(hints(LoraSpec)),
    "reference": ("from", "kind", "cache_dir"),
    "data": tuple(hints(DataSpec)),
    "rollout": tuple(hints(RolloutSpec)),
}


def canonical(raw: Mapping[str, Any], report: Report) -> Tree:
    """A recipe's tree in po's own terms. What has no translation is reported and left out."""
    tree: Tree = {k: v for k, v in raw.items() if k in KEYS}
    expand(tree, report)
    said: dict[str, tuple[str, Any]] = {}
    for key, value in raw.items():
        if key in LOSS_KEYS:
            said[LOSS_KEYS[key]] = (key, value)
        elif key not in (*KEYS, *HANDLERS, *grpo_loss.CLIP) and not _apply(tree, key, value, (), report):
            _unknown(key, report)
    for key, handler in HANDLERS.items():
        if key in raw:
            handler(tree, key, raw[key], raw, report)
    theirs = tree.get("loss") is None and grpo_loss.head(said, raw, report)
    losses.flat(tree, said, report)
    grpo_loss.clip(tree.get("loss") or [], raw, theirs, report)
    return tree


def _apply(tree: Tree, key: str, value: Any, inside: Keys, report: Report) -> bool:
    """Move, drop or refuse one foreign name; False where it is not known."""
    at = (*inside, key)
    if key in DROPPED:
        report.note(f"{show(at)}: has no effect; {DROPPED[key]}")
    elif key in REFUSED or (not inside and key in arguments.OWNED):
        if value in OFF or value in HARMLESS.get(key, ()):
            report.note(f"{show(at)}: {shown(value)} asks for nothing and is left out")
        else:
            report.wrong(at, f"cannot be translated: {REFUSED.get(key) or arguments.OWNED[key]}.")
    elif key in MOVED:
        _put(tree, MOVED[key], value, at, report)
    elif not inside and key in arguments.known():
        _put(tree, Move(f"train.{key}"), value, at, report)
    else:
        return False
    return True


def _put(tree: Tree, move: Move, value: Any, written: Keys, report: Report) -> None:
    """Write a value at its new place and say so; a value that is already there is a contradiction."""
    place = tuple(move.path.split("."))
    node = tree
    for part in place[:-1]:
        node[part] = {} if node.get(part) is None else node[part]
        node = node[part]
        if not isinstance(node, dict):
            return  # not a mapping: reported where sections are parsed
    if place[-1] in node:
        report.wrong(written, f"is another name of {move.path}, which the recipe gives as well; keep one of them.")
        return
    node[place[-1]] = move.convert(value) if move.convert and value is not None else value
    report.origin[place] = f"given as {show(written)}"
    remark = f" ({move.remark})" if move.remark else ""
    report.note(f"{show(written)}: translated to {move.path}: {shown(node[place[-1]])}{remark}")


def _unknown(key: str, report: Report) -> None:
    places = {name: f"{section}.{name}" for section, names in SECTIONS.items() for name in names}
    if key in places:
        report.wrong((key,), f"does not stand at the top level; write it as {places[key]}.")
        return
    near = suggest(key, [*KEYS, *arguments.known(), *places, *MOVED, *LOSS_KEYS, *grpo_loss.CLIP, *HANDLERS])
    report.wrong((key,), f"unknown key.{near} A recipe has: {', '.join(KEYS)}.")


def expand(tree: Tree, report: Report) -> None:
    """Write every shorthand of po's own sections out, in place, and rename foreign names inside them."""
    for section, first in (("model", "name_or_path"), ("reference", "from"), ("data", "train")):
        if isinstance(tree.get(section), str | list):
            tree[section] = {first: tree[section]}
    if tree.get("lora") is False:
        tree["lora"] = None
    for section in ("model", "lora", "reference", "data", "rollout", "train"):
        if isinstance(tree.get(section), dict):
            tree[section] = dict(tree[section])
            _rename_inside(tree, section, report)
    if isinstance(tree.get("data"), dict):
        for split in ("train", "eval"):
            if tree["data"].get(split) is not None:
                tree["data"][split] = [{"path": s} if isinstance(s, str) else s for s in listed(tree["data"][split])]
    rollout = tree.get("rollout")
    if isinstance(rollout, dict) and rollout.get("rewards") is not None:
        rollout["rewards"] = [{"function": r} if isinstance(r, str) else r for r in listed(rollout["rewards"])]
    if tree.get("loss") is not None:
        tree["loss"] = [losses.term(t, ("loss", i), report) for i, t in enumerate(listed(tree["loss"]))]


def _rename_inside(tree: Tree, section: str, report: Report) -> None:
    names = SECTIONS.get(section) or arguments.known()
    for key in [k for k in tree[section] if k not in names]:
        here = key in MOVED and MOVED[key].path.startswith(f"{section}.")
        if here or key in DROPPED or (key in REFUSED and key not in arguments.OWNED):
            _apply(tree, key, tree[section].pop(key), (section,), report)
        elif key in MOVED:
            report.wrong((section, key), f"does not stand here; write it as {MOVED[key].path}.")
            del tree[section][key]

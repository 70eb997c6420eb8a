"""`key=value` from the command line, laid over a recipe: it wins over the file, and the last over the ones before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from po.aliases import HYPERPARAMETERS, LOSS_KEYS, MOVED
from po.errors import UserError, suggest
from po.recipe import grpo_loss
from po.recipe.fields import shown
from po.recipe.losses import Tree, spread
from po.recipe.report import Report
from po.recipe.text import Keys, override, show
from po.recipe.translate import KEYS, canonical, expand


def apply(tree: Tree, word: str, report: Report, known: Sequence[str] = KEYS) -> None:
    """One override on a canonical tree, in place; what is wrong with it is reported.

    known: the keys of the top level; peers' flat names are those of a policy's recipe alone.
    """
    try:
        keys, value = override(word)
    except UserError as e:
        report.problems.append(str(e))
        return
    if len(keys) == 1 and keys[0] not in known and known is KEYS:
        _flat(tree, str(keys[0]), value, report)
    elif keys[0] not in known:
        near = suggest(str(keys[0]), known)
        report.problems.append(f"command line: {show(keys)}: unknown key.{near} A recipe has: {', '.join(known)}.")
    else:
        place = _set(tree, keys, value, report)
        if place:
            report.origin[place] = "given on the command line"
            expand(tree, report)


def _flat(tree: Tree, key: str, value: Any, report: Report) -> None:
    """A peer's flat name: translated on its own, then laid over the tree."""
    if LOSS_KEYS.get(key) not in (None, "type", "weights", "sft") and tree.get("loss"):
        spread(tree["loss"], LOSS_KEYS[key], key, value, report, replace=True)
        return
    if key in grpo_loss.CLIP and tree.get("loss"):
        grpo_loss.clip(tree["loss"], {key: value}, False, report, replace=True)
        return
    alone = Report("command line")
    patch = canonical({key: value} | ({"rollout": {}} if tree.get("rollout") else {}), alone)
    report.problems += alone.problems
    report.origin |= {place: f"{how} on the command line" for place, how in alone.origin.items()}
    for note in alone.notes:
        report.note(note)
    _lay(tree, patch)


def _lay(under: Tree, over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _lay(under[key], value)
        else:
            under[key] = value


def _set(tree: Tree, keys: Keys, value: Any, report: Report) -> Keys | None:
    """Write a value at its place: where it now stands, or None and a report. A list of one needs no index."""
    node: Any = tree
    place: Keys = ()
    for n, key in enumerate(keys):
        if isinstance(node, list) and not isinstance(key, int) and len(node) == 1:
            node, place = node[0], (*place, 0)
        why = _dead_end(node, place, key)
        if why:
            report.problems.append(f"command line: {show(keys)}: {why}.")
            return None
        key = _own_name(place, key, node)
        place = (*place, key)
        if n == len(keys) - 1:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    if place[-1] != keys[-1]:
        report.note(f"{show(keys)}: translated to {show(place)}: {shown(value)}")
    return place


def _dead_end(node: Any, place: Keys, key: str | int) -> str:
    """Why a key leads nowhere from here; '' where it leads on."""
    if isinstance(node, list) and not isinstance(key, int):
        return f"{show(place)} has {len(node)} entries; say which, e.g. {show((*place, 0, key))}"
    if isinstance(node, list) and isinstance(key, int) and key >= len(node):
        return f"{show(place)} has {len(node)} entries, counted from 0; there is no [{key}]"
    if not isinstance(node, list) and (not isinstance(node, dict) or isinstance(key, int)):
        return f"{show(place)} is {shown(node)}, which has no {key!r}"
    return ""


def _own_name(place: Keys, key: str | int, node: Any) -> str | int:
    """A foreign name behind a section's name, as ours: train.warmup_ratio -> warmup_steps, ipo's beta -> tau."""
    if len(place) == 1 and key in MOVED:
        section, _, name = MOVED[str(key)].path.partition(".")
        return name if section == place[0] else key
    if place[:1] == ("loss",) and isinstance(node, dict):
        move = HYPERPARAMETERS.get((str(node.get("head")), str(key)))
        return move.path if move and move.convert is None else key
    return key

"""What `po heads` says: the list of heads, and one head's formula, fields, needs and source."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import MISSING, fields

from po.ambiguous import no_such
from po.errors import UserError
from po.heads import HEADS
from po.recipe.fields import describe, hints, shown
from po.types import Head, Needs

_LAYOUTS = {
    "pair": "pairs (derived from sets by data.pairing)",
    "set": "sets of K >= 2 responses",
    "unpaired": "single labelled responses",
    "labelled": "prompts with K >= 1 responses labelled good, bad or not at all",
    "best": "the best response of each row",
}


def listing() -> str:
    """One line per head: its name, what it is fed, what it is."""
    width = max(map(len, HEADS))
    lines = [f"{name:{width}}  {cls.needs.layout:8}  {_doc(cls).splitlines()[0]}" for name, cls in HEADS.items()]
    return "\n".join([*lines, "", "`po heads NAME` prints a head's formula, fields, needs and source."])


def explain(name: str) -> str:
    """A head's module docstring, hyperparameters with types, defaults and ranges, needs, and where its code is."""
    if name not in HEADS:
        raise UserError(f"po heads: {no_such(name)}")
    cls = HEADS[name]
    rows = [(f.name, _default(f.default), describe(hints(cls)[f.name])) for f in fields(cls)]  # type: ignore[arg-type]
    rows.append(("weight", "1.0", "a number > 0; of this term in the sum of `loss`"))
    width = max(len(r[0]) for r in rows)
    parts = [
        f"{name}\n{'=' * len(name)}",
        _doc(cls),
        "Hyperparameters:\n" + "\n".join(f"    {n:{width}}  {kind} (default: {d})" for n, d, kind in rows),
        "Needs:\n" + textwrap.indent(_needs(cls.needs), "    "),
        "In a recipe:\n    loss:\n      - {"
        + ", ".join([f"head: {name}", *(f"{n}: {d}" for n, d, _ in rows[:-1])])
        + "}",
        f"Source: {inspect.getsourcefile(cls)}",
    ]
    return "\n\n".join(parts)


def _doc(cls: type[Head]) -> str:
    return (inspect.getdoc(inspect.getmodule(cls)) or cls.__name__).strip()


def _default(value: object) -> str:
    return "none; it must be given" if value is MISSING else shown(value)


def _needs(needs: Needs) -> str:
    rows = "sets of K >= 1 responses, taken one by one" if needs.single else _LAYOUTS[needs.layout]
    rows += f", K = {needs.group_size}" if needs.group_size is not None else ""
    lines = [f"rows: {rows}", f"averaged over: {needs.unit}s"]
    wants = {
        "reference log-probs (`reference:`)": needs.reference,
        "a reward on every response": needs.reward,
        "a label on every response": needs.label,
        "log-probs under the policy that sampled (`rollout:`, or rows with logps)": needs.behaviour,
        "the KL to the reference at every token": needs.token_kl,
        "the policy's collision probability at every token": needs.collision,
        "which tokens of a pair were edited": needs.differs,
        "a teacher's log-probs of its likeliest tokens, stored with the rows": needs.teacher,
        "an embedding of every response": needs.embedding,
        "an embedding of every prompt": needs.prompt_embedding,
        "another row's response after each prompt": needs.mismatch,
        "the same responses after the row's privileged prompt (`privileged_prompt`)": needs.privileged,
        "how much of the run is done": needs.progress,
        f"row columns: {', '.join(needs.columns)}": bool(needs.columns),
        f"columns of each response: {', '.join(needs.response_columns)}": bool(needs.response_columns),
        f"columns of each token: {', '.join(needs.token_columns)}": bool(needs.token_columns),
        f"hidden states of the {needs.hidden}": needs.hidden,
        "all groups of the optimizer step at once": needs.couples_batch,
    }
    return "\n".join([*lines, *(what for what, wanted in wants.items() if wanted)])

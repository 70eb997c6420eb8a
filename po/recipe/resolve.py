"""A recipe written out in full, defaults included: what the run folder keeps, and what makes the same run again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from po.recipe import text
from po.recipe.checks import name_of
from po.spec import Recipe, Term

REDACTED = "<redacted>"
_SECRET = re.compile(r"(?:^|_)(?:token|key|keys|apikey|secret|password|passwd|credential|credentials)$", re.IGNORECASE)
_HEAD = "# Every value of the run, defaults included. `po train` on this file makes the same run.\n"


def resolved_text(recipe: Recipe) -> str:
    """The text of recipe.resolved.yaml. `load` reads an equal recipe from it, but for secrets, which are taken out."""
    return _HEAD + text.dump(resolved(recipe))


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain mappings, lists and scalars, in the order of the schema, secrets taken out."""
    reference = asdict(recipe.reference)
    out: dict[str, Any] = {
        "model": asdict(recipe.model),
        "lora": None if recipe.lora is None else asdict(recipe.lora),
        "reference": {"from": reference.pop("source"), **reference},
        "data": asdict(recipe.data),
        "rollout": None if recipe.rollout is None else asdict(recipe.rollout),
        "loss": [_term(t) for t in recipe.loss],
        "train": dict(recipe.train),
        "max_tokens_per_forward": recipe.max_tokens_per_forward,
        "deepspeed": recipe.deepspeed,
        "output_dir": recipe.output_dir,
        "resume": recipe.resume,
        "seed": recipe.seed,
    }
    return {k: plain(v, k) for k, v in out.items()}


def _term(term: Term) -> dict[str, Any]:
    own = {f.name: getattr(term.head, f.name) for f in fields(term.head)}  # type: ignore[arg-type]  # a dataclass
    return {"head": name_of(term.head), "weight": term.weight, **own}


def plain(node: Any, key: str) -> Any:
    """Mappings, lists and scalars, secrets taken out; key: the node's own name."""
    if isinstance(node, str) and node and _SECRET.search(key):
        return REDACTED
    if isinstance(node, Mapping):
        return {str(k): plain(v, str(k)) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [plain(v, key) for v in node]
    return node

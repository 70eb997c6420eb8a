"""What a recipe's keys mean: the declarations and comments of po/spec.py, read as text (an import costs torch)."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

PLACES = {
    "at the top level": "Recipe",
    "model": "ModelSpec",
    "lora": "LoraSpec",
    "reference": "ReferenceSpec",
    "data": "DataSpec",
    "data.train[], data.eval[]": "Source",
    "rollout": "RolloutSpec",
    "rollout.rewards[]": "RewardSpec",
    "loss[], beside the head's own (`po heads`)": "Term",
}


@cache
def documentation() -> dict[str, dict[str, tuple[str, str]]]:
    """Class -> field -> (declaration, comment)."""
    source = Path(__file__).with_name("spec.py").read_text("utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    out: dict[str, dict[str, tuple[str, str]]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            out[node.name] = {
                f.target.id: (_declaration(f), comments.get(f.end_lineno or f.lineno, ""))
                for f in node.body
                if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
            }
    return out


def _declaration(field: ast.AnnAssign) -> str:
    text = ast.unparse(field.annotation)
    return text if field.value is None else f"{text} = {ast.unparse(field.value)}"


def listing() -> str:
    """Every key with its type, default and comment, by section."""
    lines = ["keys of a recipe:"]
    for place, cls in PLACES.items():
        lines.append(f"  {place}")
        for name, (declared, comment) in documentation()[cls].items():
            key = "from" if (cls, name) == ("ReferenceSpec", "source") else name
            lines.append(f"    {key}: {declared}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"

"""Imports point down this list, never up or sideways; a module that is not on it lies above all that it imports."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first. "x.*" is a package as one layer, within which modules may import each other (heads may not).
LAYERS = [
    *("errors", "types", "numeric", "heads.*", "spec", "data.rows", "objective", "forest", "data.*", "attention"),
    *("logprob", "batch", "order", "policy", "reference", "metrics", "checkpoint", "callbacks", "rewards.*"),
    *("rollout.*", "trainer", "recipe.*", "export", "run", "prep.*", "reward_model.*", "sandbox.*", "cli"),
]


def listed(module: str) -> int | None:
    """The most specific name wins: data.rows lies below the rest of data.*"""
    names = [name for name in LAYERS if f"po.{name}" == module or f"{module}.".startswith(f"po.{name.rstrip('*')}")]
    return LAYERS.index(max(names, key=lambda name: (not name.endswith("*"), len(name)))) if names else None


@cache
def height(module: str) -> float:
    """A place in LAYERS, or just above the highest import; a circle of unlisted modules ends in a RecursionError."""
    place = listed(module)
    return place if place is not None else max((height(name) for name in imports(module)), default=-1) + 0.01


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of the po modules that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full.startswith("po.") and file_of(full).exists() else node.module or "")
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return frozenset(name for name in found if name.startswith("po.")) - {module}


MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT / "po").rglob("*.py"))]


def may_import(module: str, name: str) -> bool:
    together = listed(name) is not None and listed(name) == listed(module) and module.count(".") <= name.count(".")
    return height(name) < height(module) or (together and not module.startswith("po.heads.")) or module == "po"


@pytest.mark.parametrize("module", [m.removesuffix(".__init__") for m in MODULES])
def test_imports_point_down(module: str) -> None:
    wrong = sorted(name for name in imports(module) if not may_import(module, name))
    assert not wrong, f"{module} imports {wrong}, not below it"


def test_the_order_is_what_it_seems() -> None:
    assert height("po.data.rows") < height("po.objective") < height("po.data.read") < height("po.trainer")
    assert height("po.heads") == height("po.heads.dpo") == height("po.heads.ipo") < height("po.spec")
    assert "po.heads.dpo" in imports("po.heads")
    assert may_import("po.heads", "po.heads.dpo")
    assert not may_import("po.heads.ipo", "po.heads.dpo")
    assert not may_import("po.heads.ipo", "po.spec")
    assert not may_import("po.objective", "po.batch")
    assert listed("po.rollouts.hf") is None

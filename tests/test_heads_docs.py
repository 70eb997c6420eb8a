"""The documents about heads are true: the catalogue is up to date, and the guide's example keeps the contract."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import heads_support
import pytest
import torch
from heads_contract import CHECKS
from heads_support import variants
from torch.testing import assert_close

from po.heads import HEADS

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = re.findall(r"```python\n(.*?)```", (DOCS / "add-a-head.md").read_text(encoding="utf-8"), re.S)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hinge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The guide's first block, as a module."""
    path = tmp_path_factory.mktemp("guide") / "hinge.py"
    path.write_text(GUIDE[0], encoding="utf-8")
    yield load("hinge", path)
    del sys.modules["hinge"]


@pytest.mark.parametrize("promise", CHECKS)
def test_the_guide_s_head_keeps_the_contract(promise: str, hinge: ModuleType) -> None:
    for head in variants(hinge.Hinge):
        CHECKS[promise](head)


def test_the_guide_s_golden_test_passes(hinge: ModuleType) -> None:
    names = {**vars(heads_support), "Hinge": hinge.Hinge, "assert_close": assert_close, "torch": torch}
    exec(GUIDE[1], names)
    with pytest.raises(AssertionError):
        exec(GUIDE[1].replace("0.125", "0.126"), names)


def test_the_guide_s_head_agrees_with_trl(hinge: ModuleType) -> None:
    """Rows of TRL 1.16 `hinge` with beta = 0.1 for log-ratio margins 1.25, -2.5 and 1.45."""
    x = heads_support.input_from_logratios([[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85]])
    assert hinge.Hinge(beta=0.1)(x).loss.tolist() == pytest.approx([0.875, 1.25, 0.855])


def test_the_catalogue_is_up_to_date() -> None:
    page = load("make_heads", DOCS / "make_heads.py").render()
    assert (DOCS / "heads.md").read_text(encoding="utf-8") == page, "run: python docs/make_heads.py"


def test_the_catalogue_has_every_head_formula_and_field() -> None:
    page = (DOCS / "heads.md").read_text(encoding="utf-8")
    for name, cls in HEADS.items():
        entry = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "loss" in entry.split("```")[1], name
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            assert f"`{field.name}` = " in entry, name
    unverified = [name for name, cls in HEADS.items() if "\nUnverified:" in (sys.modules[cls.__module__].__doc__ or "")]
    assert page.count("*Unverified*") == len(unverified) > 0


def test_documents_name_no_file_that_is_not_there() -> None:
    for page in ("heads.md", "add-a-head.md", "notation.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        paths = set(re.findall(r"`((?:po|docs|tests)/[\w/.-]+\.\w+)`", text)) - {"po/heads/hinge.py"}
        links = {f"docs/{link}" for link in re.findall(r"\]\(([\w-]+\.md)\)", text)}
        missing = [p for p in paths | links if not (DOCS.parent / p).exists()]
        assert not missing, f"{page}: {missing}"

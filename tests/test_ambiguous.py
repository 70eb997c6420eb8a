"""Names that several methods have: a recipe is asked which one it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import make_model, write_pairs, write_recipe

from po.ambiguous import AMBIGUOUS, which
from po.errors import UserError
from po.heads import HEADS
from po.recipe import load
from po.recipe.explain import explain

RPO = (
    "is the name of 3 methods. Write the one you mean: 'rpo_sft' (Regularised PO: DPO and an SFT loss on the chosen "
    "response, Liu et al. 2024); 'rpo_contrast' (Relative PO: contrast over different prompts, Yin et al. 2024); "
    "Reward-aware PO, which po does not have."
)


def test_a_recipe_is_asked_which_one(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    rows = write_pairs(tmp_path / "pairs.jsonl", 2)
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", rows, tmp_path / "out", loss=[{"head": "RPO"}])
    with pytest.raises(UserError) as error:
        load(recipe)
    assert f"loss[0].head: 'RPO' {RPO}" in str(error.value)


def test_po_heads_asks_too() -> None:
    with pytest.raises(UserError) as error:
        explain("rpo")
    assert str(error.value) == f"po heads: 'rpo' {RPO}"


@pytest.mark.parametrize("name", ["mDPO", "r-dpo", "R_DPO", "IRPO", "apo", "GCPO", "HyPO", "SDPO"])
def test_spelling_does_not_matter(name: str) -> None:
    assert (which(name) or "").startswith(f"{name!r} is the name of ")


def test_what_is_offered_exists_and_no_head_has_an_ambiguous_name() -> None:
    offered = {write for methods in AMBIGUOUS.values() for write, _ in methods if re.fullmatch(r"\w+", write)}
    assert offered <= set(HEADS)
    assert not set(AMBIGUOUS) & set(HEADS)
    assert which("dpo") is None

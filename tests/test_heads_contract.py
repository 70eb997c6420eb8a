"""Every promise of tests/heads_contract.py, for every head that recipes can name, in every variant of its fields."""

import pytest
import torch
from heads_contract import CHECKS
from heads_support import change, name_of, random_input, variants

from po.heads import HEADS
from po.heads.dpo import DPO
from po.heads.mpo_multi import MPOMulti
from po.types import Head

ALL = [head for cls in HEADS.values() for head in variants(cls)]


@pytest.mark.parametrize("head", ALL, ids=name_of)
@pytest.mark.parametrize("promise", CHECKS)
def test_head_keeps_its_promise(promise: str, head: Head) -> None:
    CHECKS[promise](head)


def test_the_table_names_each_class_once_in_order() -> None:
    assert list(HEADS) == sorted(HEADS)
    assert len(set(HEADS.values())) == len(HEADS)
    for name, cls in HEADS.items():
        assert cls.__module__ == f"po.heads.{name}"


def test_every_head_has_its_variants() -> None:
    """Were variants() blind to a field, the contract would only hold for its default."""
    found = {name_of(h) for h in variants(MPOMulti)}
    assert found == {f"MPOMulti{v}" for v in ("", "-beta=0.3", "-alpha=0.3", "-power=0", "-power=2", "-signed=True")}


def test_undeclared_input_says_what_to_add() -> None:
    with pytest.raises(LookupError) as error:
        DPO()(change(random_input(DPO.needs), ref=None))
    assert str(error.value) == "the head reads ref_T but does not declare it: add reference=True to its Needs"


def test_metrics_are_prefixed_with_the_head_s_name() -> None:
    for name, cls in HEADS.items():
        out = cls()(random_input(cls()))
        assert all(key.startswith(f"{name}/") for key in out.metrics)
        assert all(torch.isfinite(v).all() for v in out.metrics.values())

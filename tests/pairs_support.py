"""What the tests of identities between pair heads share."""

from __future__ import annotations

from typing import Any

import torch
from heads_support import F64, change, loss_and_grad, random_input
from torch import Tensor
from torch.testing import assert_close

from po.objective import counted, objective, scope
from po.spec import Term
from po.types import Head, HeadInput, Needs

EVERYTHING = Needs(
    layout="pair",
    reference=True,
    collision=True,
    embedding=True,
    prompt_embedding=True,
    columns=("consistency", "thinking"),
)


def same(a: Head, b: Head, x: HeadInput, **close: float) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, x), **{"rtol": 1e-12, "atol": 1e-14, **close})


def pairs(**fields: Any) -> HeadInput:
    """Three random pairs of unequal lengths with everything that a head of this file reads."""
    return change(random_input(EVERYTHING), **fields)


def column(name: str, value: float) -> HeadInput:
    return pairs(columns={name: torch.full((3,), value, dtype=F64)})


def step_loss(terms: list[Term], x: HeadInput) -> Tensor:
    """The objective of a step that consists of x."""
    counts = {over: float(counted(x, over).sum()) for over in {scope(t.head.needs) for t in terms}}
    return objective(terms, x, counts).loss

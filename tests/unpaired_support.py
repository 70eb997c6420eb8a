"""What the golden tests of heads for labelled responses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from heads_golden import Objective, token_values
from heads_support import F64, change, grid, loss_and_grad, random_input, segments
from mpmath import mpf
from torch.testing import assert_close

from po.types import Head, HeadInput

LENGTHS = ((3,), (1,), (5,), (2,), (4,), (1,))
LABELS = torch.tensor([[1], [-1], [1], [1], [-1], [1]])
GROUPS = ((3, 1, 4, 2), (2, 5), (1, 2, 1), (6,), (1, 2, 2))
KINDS = torch.tensor([[1, -1, 0, 0], [1, -1, 0, 0], [1, 0, -1, 0], [-1, 0, 0, 0], [0, 0, 0, 0]])
Made = Callable[[HeadInput], Objective]


def rows(head: Head, seed: int = 3, **given: Any) -> HeadInput:
    """Six labelled responses, four of them desirable."""
    return change(random_input(head, LENGTHS, seed), **{"label": LABELS, **given})


def groups(head: Head, seed: int = 3) -> HeadInput:
    """Prompts with pairs and unlabelled responses, without one side, and without labels."""
    return change(random_input(head, GROUPS, seed), label=KINDS)


def sums(x: HeadInput, policy: list[mpf], reference: bool = True) -> list[list[mpf]]:
    """log pi/ref (or log pi) of each response, by group."""
    base = x.ref_T.tolist() if reference else [0.0] * len(policy)
    return [[sum(r) for r in g] for g in token_values(x, [p - mpf(b) for p, b in zip(policy, base, strict=True)])]


def labels(x: HeadInput) -> list[int]:
    return x.label_GK.flatten().tolist()


def mean(values: list[mpf]) -> mpf:
    return sum(values) / len(values)


WIN, WIN_REF = [-12.5, -20.25, -8.0], [-13.0, -19.0, -8.6]
LOSE, LOSE_REF = [-14.0, -18.5, -9.75], [-13.25, -19.75, -8.9]
SIZES = [[5], [8], [3], [6], [7], [4]]


def given(logp: list[list[float]], ref: list[list[float]], sizes: list[list[int]], label: list[list[int]]) -> HeadInput:
    """Sums spread evenly over the tokens; a group's labels may end early. The figures' inputs are given so."""
    seg = segments(sizes)
    policy_T, ref_T = (seg.spread(grid(v) / seg.length_GK) for v in (logp, ref))
    return HeadInput(seg, policy_T.requires_grad_(True), ref=ref_T, label=grid(label, empty=0).long())


def check(head: Head, x: HeadInput, loss: float, grad: list[list[float]], rows: list[float] | None = None) -> None:
    """The mean loss, its gradient with respect to each response's summed log-prob, and the losses: to 6 decimals."""
    loss_G, grad_T = loss_and_grad(head, x)
    units = loss_G[x.seg.valid_GK] if loss_G.dim() == 2 else loss_G
    assert_close(units.mean(), torch.tensor(loss, dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, x.seg.spread(grid(grad)), rtol=0, atol=6e-7)
    if rows is not None:
        assert_close(loss_G.flatten(), torch.tensor(rows, dtype=F64), rtol=0, atol=6e-7)


def column(values: list[float]) -> list[list[float]]:
    return [[v] for v in values]

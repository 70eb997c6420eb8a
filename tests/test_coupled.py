"""Heads that couple the groups of an optimizer step: no split of the step changes what they see or do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from annotated_types import Gt
from heads_support import F64, change, random_input, segments
from test_trainer import logs, run, weights, world  # noqa: F401
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.numeric import masked_mean
from po.objective import counted, objective, scope
from po.spec import Term
from po.types import Head, HeadInput, HeadOutput, Needs
from po.whole import for_other_rows, join, signals, whole


@dataclass(frozen=True)
class Centred(Head):
    """DPO against the mean margin of the step, a running mean of it, and how often each row was seen."""

    needs: ClassVar[Needs] = Needs(layout="pair", reference=True, row=True, couples_batch=True)
    beta: Annotated[float, Gt(0)] = 0.5

    def __call__(self, x: HeadInput) -> HeadOutput:
        here_G = x.seg.valid_GK.any(-1)
        margin_G = self.beta * (x.logratio_GK[:, 0] - x.logratio_GK[:, 1])
        mean = masked_mean(margin_G, here_G)
        seen = x.state["seen"].index_add(0, x.row_G.clamp(min=0), here_G.double())
        return HeadOutput(-logsigmoid(margin_G - mean / 2), state={"mean": mean.detach(), "seen": seen})

    def state(self, rows: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros((), dtype=F64), "seen": torch.zeros(rows, dtype=F64)}


def inputs(head: Head, *lengths: list[list[int]]) -> list[HeadInput]:
    found, row = [], 0
    for seed, part in enumerate(lengths):
        x = random_input(head, part, seed=seed)
        found.append(change(x, row=torch.arange(row, row + len(part))))
        row += len(part)
    return found


def test_a_step_taken_together_has_the_gradient_of_one_batch() -> None:
    head = Centred()
    parts = inputs(head, [[3, 5], [1, 2]], [[4, 1]], [[1, 1], [2, 2], [3, 1]])
    over = scope(head.needs)
    together = join(parts)
    counts = {over: float(counted(together, over).sum())}
    policy_T = together.policy_T.detach().requires_grad_(True)
    states = [head.state(6)]
    want = objective([Term(head)], change(together, policy_T=policy_T), counts, states)
    (grad_T,) = torch.autograd.grad(want.loss, policy_T)
    step = whole([Term(head)], parts, counts, states)
    shares = [share.loss(signals(x), world=1) for share, x in zip(step.shares, parts, strict=True)]
    mine = torch.cat([torch.autograd.grad(loss, x.policy_T)[0] for loss, x in zip(shares, parts, strict=True)])
    assert_close(mine, grad_T, rtol=0, atol=1e-15)
    assert_close(torch.stack(shares).sum().detach(), want.loss.detach())
    assert step.parts.outputs[0].state["seen"].tolist() == [1.0] * 6


def test_joining_keeps_ragged_groups_apart() -> None:
    needs = Needs(layout="set", reference=True, reward=True, teacher=True, columns=("value",))
    a, b = random_input(needs, [[2, 1], [3]], seed=1), random_input(needs, [[1, 2, 1, 4]], seed=2)
    b = change(b, teacher=torch.cat([b.teacher_TM, b.teacher_TM], 1))
    x = join([a, b])
    assert x.seg.valid_GK.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert_close(x.logratio_GK[:2, :2], a.logratio_GK)
    assert_close(x.logratio_GK[2:], b.logratio_GK)
    assert_close(x.reward_GK[2], b.reward_GK[0])
    assert x.teacher_TM[: a.policy_T.numel(), 3:].isneginf().all()
    assert_close(x.column_G("value"), torch.cat([a.column_G("value"), b.column_G("value")]))


def test_evaluation_rows_have_rows_of_their_own() -> None:
    head = Centred()
    state = {"mean": torch.tensor(2.0), "seen": torch.ones(7)}
    other = for_other_rows(Term(head), state, rows=3)
    assert other["mean"] == 2.0
    assert other["seen"].tolist() == [0.0, 0.0, 0.0]

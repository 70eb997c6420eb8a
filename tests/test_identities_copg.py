"""What CoPG says of policy gradients, of regression and of IPO, and what it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads_support import input_from_logratios, loss_and_grad, random_input
from torch import Tensor
from torch.testing import assert_close

from po.heads.copg import CoPG
from po.heads.ipo import IPO
from po.types import HeadInput

LENGTHS = ((2, 1, 3, 1), (1, 3), (2, 3, 1), (2, 2))


def groups(x: HeadInput, values_GK: Tensor) -> list[Tensor]:
    """The numbers of each group, without empty places."""
    return [row[valid] for row, valid in zip(values_GK, x.seg.valid_GK, strict=True)]


def regularised(x: HeadInput, beta: float) -> list[tuple[Tensor, Tensor]]:
    """R - beta d and d of each group's responses."""
    d_GK = x.logratio_GK
    return list(zip(groups(x, x.reward_GK - beta * d_GK), groups(x, d_GK), strict=True))


def check_gradient(loss_of: list[Tensor], x: HeadInput, beta: float) -> None:
    """CoPG has the gradient of the mean of these losses of groups."""
    (expected_T,) = torch.autograd.grad(torch.stack(loss_of).mean(), x.policy_T, retain_graph=True)
    assert_close(loss_and_grad(CoPG(beta=beta), x)[1], expected_T)


def test_copg_is_the_literal_loss_with_half_of_beta_inside() -> None:
    x = random_input(CoPG(), LENGTHS, seed=5)
    loss_of = []
    for R, d in regularised(x, 0.3 / 2):
        pairs = itertools.combinations(range(len(R)), 2)
        loss_of.append(-torch.stack([(R[i] - R[j]) * d[i] + (R[j] - R[i]) * d[j] for i, j in pairs]).mean())
    check_gradient(loss_of, x, 0.3)
    assert_close(CoPG(beta=0.3)(x).loss, torch.stack(loss_of))


def test_copg_has_the_gradient_of_a_policy_gradient_with_the_whole_beta_in_a_constant_weight() -> None:
    """And twice that of the leave-one-out form, averaged over responses."""
    x = random_input(CoPG(), LENGTHS, seed=5)
    pairwise, leave_one_out, by_mean = [], [], []
    for R, d in regularised(x, 0.3):
        R, n = R.detach(), len(R)
        pairs = list(itertools.combinations(range(n), 2))
        pairwise.append(-torch.stack([(R[i] - R[j]) * (d[i] - d[j]) for i, j in pairs]).mean())
        leave_one_out.append(-2 * ((R - (R.sum() - R) / (n - 1)) * d).mean())
        by_mean.append(-2 / (n - 1) * ((R - R.mean()) * d).sum())
    for loss_of in (pairwise, leave_one_out, by_mean):
        check_gradient(loss_of, x, 0.3)


def test_copg_is_a_regression_of_the_log_ratio_on_the_reward() -> None:
    """Its residual is a metric: loss = (residual - spread) / (2 beta)."""
    x, beta = random_input(CoPG(), LENGTHS, seed=5), 0.3
    metrics = CoPG(beta=beta)(x).metrics
    squares = []
    for g, (R, d) in enumerate(zip(groups(x, x.reward_GK), groups(x, x.logratio_GK), strict=True)):
        pairs = list(itertools.combinations(range(len(R)), 2))
        dR, D = (torch.stack([v[i] - v[j] for i, j in pairs]) for v in (R, d))
        squares.append(((dR - beta * D) ** 2).mean() / (2 * beta))
        assert_close(metrics["copg/residual"][g], ((dR - beta * D) ** 2).mean().detach())
        assert_close(metrics["copg/pull"][g], ((beta * D) ** 2).mean().detach())
        assert_close(metrics["copg/spread"][g], (dR**2).mean())
    check_gradient(squares, x, beta)
    assert_close(CoPG(beta=beta)(x).loss, torch.stack(squares) - metrics["copg/spread"] / (2 * beta))


@pytest.mark.parametrize("beta", [0.06, 0.5])
def test_copg_with_rewards_a_quarter_apart_from_zero_is_ipo(beta: float) -> None:
    x = input_from_logratios([[0.5, -0.75], [3.0, 7.0], [-0.2, 0.0]], [[0.25, -0.25]] * 3)
    _, copg_T = loss_and_grad(CoPG(beta=beta), x)
    _, ipo_T = loss_and_grad(IPO(tau=beta), x)
    assert_close(copg_T, beta / 2 * ipo_T)


def test_copg_has_no_gradient_in_any_pair_at_the_optimum() -> None:
    """log pi/ref = R / beta + c, whatever else the group holds; elsewhere it has one."""
    reward, beta = [[1.2, -0.4], [0.3, -1.5], [8.0, 8.0], [1.2, -1.5]], 0.3
    best = [[r / beta - 4.0 * g for r in row] for g, row in enumerate(reward)]
    _, grad_T = loss_and_grad(CoPG(beta=beta), input_from_logratios(best, reward))
    assert_close(grad_T, torch.zeros_like(grad_T), rtol=0, atol=1e-12)
    _, half_T = loss_and_grad(CoPG(beta=2 * beta), input_from_logratios(best, reward))
    assert (half_T.view(4, 2).abs()[[0, 1, 3]] > 0.1).all()


def test_copg_ignores_a_response_without_another() -> None:
    loss_G, grad_T = loss_and_grad(CoPG(), input_from_logratios([[3.0], [1.0, 2.0]], [[5.0], [1.0, 0.0]]))
    assert loss_G[0] == 0
    assert grad_T[0] == 0
    assert grad_T[1] != 0

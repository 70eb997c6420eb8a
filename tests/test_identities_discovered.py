"""What the discovered losses say of DPO and of one another: shapes, extremes, and the statistics of a step."""

from __future__ import annotations

import math

import pytest
import torch
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input
from torch import Tensor
from torch.testing import assert_close

from po.heads.aqfl import AQFL
from po.heads.aql import AQL
from po.heads.cell import CELL
from po.heads.dbaql import DBAQL
from po.heads.discopop import DiscoPOP
from po.heads.dpo import DPO
from po.heads.hinge import Hinge
from po.heads.padll import PADLL
from po.heads.pfl import PFL
from po.types import Head

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]


def over(head: Head, m: Tensor, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Loss and its slope at margins m = beta h, each a step of its own."""
    found = [loss_and_grad(head, input_from_logratios([[float(v), 0.0]], dtype=dtype)) for v in m / head.beta]  # type: ignore[attr-defined]
    loss = torch.cat([loss for loss, _ in found])
    return loss, torch.stack([grad_T[0] for _, grad_T in found]) / head.beta  # type: ignore[attr-defined]


def test_discopop_s_extrema_are_where_its_page_says() -> None:
    """The slope is that of a valley at -0.119 and of a hill at 0.072, and no other changes sign."""
    m = torch.linspace(-1, 1, 2001, dtype=F64)
    loss, slope = over(DiscoPOP(), m)
    turns = (slope[:-1].sign() != slope[1:].sign()).nonzero().flatten()
    assert m[turns].tolist() == pytest.approx([-0.119, 0.072], abs=1e-3)
    assert loss[turns].tolist() == pytest.approx([0.7859, 0.8783], abs=1e-4)
    assert slope[1000] == pytest.approx(0.784264, abs=1e-6)


@pytest.mark.parametrize("m", [-30.0, -100.0, -1000.0])
def test_discopop_far_below_is_linear(m: float) -> None:
    """s(m / t) exp(-m) is 0 there, not 0 * inf: the loss is |m|, also in single precision."""
    loss, slope = over(DiscoPOP(), torch.tensor([m]), torch.float32)
    assert loss.tolist() == pytest.approx([-m], rel=1e-6)
    assert slope.tolist() == pytest.approx([-1.0], rel=1e-6)


@pytest.mark.parametrize(("m", "right"), [(3.0, 0.0), (-3.0, 1.0)])
def test_a_sharp_gate_takes_one_side(m: float, right: float) -> None:
    """tau -> 0: DPO below 0 and the exponential above; CELL is the mean of the two everywhere."""
    dpo, _ = over(DPO(beta=0.05), torch.tensor([m]))
    loss, _ = over(DiscoPOP(tau=1e-4), torch.tensor([m]))
    assert_close(loss, right * dpo + (1 - right) * math.exp(-m))
    both, _ = over(CELL(), torch.tensor([m]))
    assert_close(both, (dpo + math.exp(-m)) / 2)


@pytest.mark.parametrize("head", [CELL(), DBAQL(), DiscoPOP(tau=2.0)], ids=name_of)
def test_capped_exponentials_leave_the_other_term(head: Head) -> None:
    """At m = -1000 in single precision: the cap of 1e13, and the slope of the logistic term alone."""
    loss, slope = over(head, torch.tensor([-1000.0]), torch.float32)
    expected = {CELL: (math.exp(30) / 2, -0.5), DBAQL: (math.exp(30), -0.5 / 0.9), DiscoPOP: (math.exp(30), -1.0)}
    assert loss.tolist() == pytest.approx([expected[type(head)][0]], rel=1e-5)
    assert slope.tolist() == pytest.approx([expected[type(head)][1]], rel=1e-5)


def test_padll_and_pfl_are_weighted_dpo_and_hinge() -> None:
    x = input_from_logratios(PAIRS)
    dpo_G, _ = loss_and_grad(DPO(beta=0.3), x)
    weight_G = torch.tensor([0.9, 0.45, 0.9, 0.9], dtype=F64)
    assert_close(loss_and_grad(PADLL(beta=0.3), x)[0], weight_G * dpo_G)
    hinge_G, _ = loss_and_grad(Hinge(beta=0.3), x)
    right_G = torch.tensor([True, False, True, True])
    assert_close(loss_and_grad(PFL(beta=0.3), x)[0], torch.where(right_G, dpo_G / 2, 2 * hinge_G))


def test_pfl_asks_the_policy_alone() -> None:
    """The same log-ratios under another reference: the ranking turns, and with it the loss."""
    x = input_from_logratios([[0.5, -0.5]])
    shift_T = torch.tensor([-3.0, 0.0], dtype=F64)
    y = change(x, policy_T=x.policy_T.detach() + shift_T, ref=x.ref_T + shift_T)
    assert (PFL()(x).metrics["pfl/right"].item(), PFL()(y).metrics["pfl/right"].item()) == (1, 0)
    assert loss_and_grad(PFL(), y)[0] == 2 * (1 - 0.05)


def test_dbaql_of_widely_spread_margins_is_dpo() -> None:
    """The variance drives c to 1: DPO with beta / 0.9 and no exponential left."""
    x = input_from_logratios([[40.0, 0.0], [-40.0, 0.0], [10.0, 3.0]])
    assert_close(loss_and_grad(DBAQL(beta=0.05), x), loss_and_grad(DPO(beta=0.05 / 0.9), x))


@pytest.mark.parametrize("head", [DBAQL(), AQL(), AQFL()], ids=name_of)
def test_a_step_of_one_pair_is_finite(head: Head) -> None:
    """No spread: DBAQL halves its terms, AQL and AQFL take the pair for its own mean."""
    z = 1.25  # h, with tau = beta
    loss_G, grad_T = loss_and_grad(head, input_from_logratios([[0.5, -0.75]]))
    m, dpo = 0.05 * z, math.log(1 + math.exp(-0.05 * z))
    s = 1 / (1 + math.exp(-z))
    gates = {AQL: 1 / (1 + math.exp(z - 0.5 - 0.01 * (s - 0.5))), AQFL: 1 / (1 + math.exp(-0.1 * abs(z - 0.05 * s)))}
    if type(head) is DBAQL:
        expected = math.log(1 + math.exp(-m / 0.9)) / 2 + math.exp(-0.9 * m) / 2
    else:
        expected = gates[type(head)] * dpo + (1 - gates[type(head)]) * (1 - m)
    assert loss_G.tolist() == pytest.approx([expected])
    assert grad_T.isfinite().all()


@pytest.mark.parametrize("head", [DBAQL(), AQL(), AQFL()], ids=name_of)
def test_statistics_are_those_of_the_step(head: Head) -> None:
    """Another pair changes a pair's loss; the order of pairs does not."""
    x = random_input(head, [(3, 5), (1, 2), (4, 1)])
    h = x.logratio_GK.tolist()
    (all_G, _), (two_G, _) = (loss_and_grad(head, input_from_logratios(rows)) for rows in (h, h[:2]))
    assert ((all_G[:2] - two_G).abs() > 1e-7).all()
    assert_close(loss_and_grad(head, input_from_logratios(h[::-1]))[0].flip(0), all_G)

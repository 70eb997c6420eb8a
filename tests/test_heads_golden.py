"""Loss and gradient of the first eight heads against their papers' formulas (mpmath, tests/heads_golden.py), and
against figures that were computed elsewhere. Further heads: tests/test_golden_*.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heads_golden import (
    Formula,
    Response,
    check_formula,
    check_pair_vector,
    check_set_vector,
    sigmoid,
    softmax,
)
from heads_support import F64, input_from_logratios, loss_and_grad, name_of
from mpmath import exp, log, mpf
from torch.testing import assert_close

from po.heads import HEADS
from po.heads.apo_down import APODown
from po.heads.apo_zero import APOZero
from po.heads.dpo import DPO
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.mpo_multi import MPOMulti
from po.heads.nca import NCA
from po.heads.sft import SFT
from po.types import Head, HeadInput


def cdpo(beta: float, e: float) -> Formula:
    def loss(u: list[Response], _: list[mpf]) -> mpf:
        h = sum(u[0]) - sum(u[1])
        return -(1 - mpf(e)) * log(sigmoid(beta * h)) - mpf(e) * log(sigmoid(-beta * h))

    return loss


def ipo(tau: float, mean: bool) -> Formula:
    def loss(u: list[Response], _: list[mpf]) -> mpf:
        better, worse = ((sum(r) / len(r) if mean else sum(r)) for r in u)
        return (better - worse - 1 / (2 * mpf(tau))) ** 2

    return loss


def infonca(beta: float, alpha: float) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        model = softmax([beta * sum(r) for r in u])
        return -sum(p * log(q) for p, q in zip(softmax([alpha * s for s in reward]), model, strict=True))

    return loss


def nca(beta: float, alpha: float) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        labels = softmax([alpha * s for s in reward])
        pull = -sum(p * log(sigmoid(beta * sum(r))) for p, r in zip(labels, u, strict=True))
        return pull - sum(log(sigmoid(-beta * sum(r))) for r in u) / len(u)

    return loss


def mpo(beta: float, weight: Callable[[mpf], mpf]) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        mean = sum(reward) / len(reward)
        terms = [weight(s - mean) * exp(beta * sum(r)) for r, s in zip(u, reward, strict=True)]
        above = [t for t, s in zip(terms, reward, strict=True) if s > mean]
        return -log(sum(above) / sum(terms)) if above else mpf(0)

    return loss


def apo_zero(beta: float) -> Formula:
    return lambda u, _: 1 - sigmoid(beta * sum(u[0])) + sigmoid(beta * sum(u[1]))


def apo_down(beta: float) -> Formula:
    return lambda u, _: sigmoid(beta * sum(u[0])) + 1 - sigmoid(beta * (sum(u[0]) - sum(u[1])))


CASES: list[tuple[Head, Formula]] = [
    (DPO(beta=0.1), cdpo(0.1, 0)),
    (DPO(beta=0.7), cdpo(0.7, 0)),
    (DPO(beta=0.1, label_smoothing=0.1), cdpo(0.1, 0.1)),
    (IPO(tau=0.1), ipo(0.1, mean=False)),
    (IPO(tau=0.03), ipo(0.03, mean=False)),
    (IPO(tau=0.1, length_normalize=True), ipo(0.1, mean=True)),
    (InfoNCA(beta=0.01, alpha=1.0), infonca(0.01, 1)),
    (InfoNCA(beta=0.5, alpha=0.5), infonca(0.5, 0.5)),
    (InfoNCA(beta=0.1, alpha=1e4), infonca(0.1, 1e4)),
    (NCA(beta=0.01, alpha=1.0), nca(0.01, 1)),
    (NCA(beta=0.5, alpha=0.5), nca(0.5, 0.5)),
    (NCA(beta=0.1, alpha=1e4), nca(0.1, 1e4)),
    (MPOMulti(beta=0.3, power=0), mpo(0.3, lambda d: mpf(1))),
    (MPOMulti(beta=0.1, alpha=0.5, power=1), mpo(0.1, lambda d: exp(abs(d) / 2))),
    (MPOMulti(beta=0.1, alpha=0.5, power=1, signed=True), mpo(0.1, lambda d: exp(d / 2))),
    (MPOMulti(beta=0.1, alpha=0.25, power=2), mpo(0.1, lambda d: exp(d**2 / 4))),
    (APOZero(beta=0.1), apo_zero(0.1)),
    (APOZero(beta=2.0), apo_zero(2)),
    (APODown(beta=0.1), apo_down(0.1)),
    (APODown(beta=2.0), apo_down(2)),
]


@pytest.mark.parametrize(("head", "formula"), CASES, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_loss_and_gradient_are_the_paper_s(head: Head, formula: Formula) -> None:
    check_formula(head, formula)


def test_sft_is_the_mean_over_the_best_responses_tokens() -> None:
    """Rewards pick response 1 of the first group and, tied, the first of the second; by hand."""
    x = input_from_logratios([[0.0, 0.0, 0.0], [0.0, 0.0]], [[1.0, 3.0, 2.0], [5.0, 5.0]], lengths=[[1, 2, 1], [3, 2]])
    policy_T = -torch.arange(1.0, 10.0, dtype=F64)  # -1 | -2 -3 | -4 || -5 -6 -7 | -8 -9
    x = HeadInput(x.seg, policy_T.requires_grad_(True), reward=x.reward)
    loss_T, grad_T = loss_and_grad(SFT(), x)
    assert_close(loss_T, -policy_T.detach())
    assert_close(grad_T, -torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0], dtype=F64) / 5)


COVERED = {type(h) for h, _ in CASES} | {SFT}


def test_every_head_has_a_golden_test() -> None:
    """Each tests/test_golden_*.py names the heads it covers, and so does this file."""
    modules = [importlib.import_module(p.stem) for p in Path(__file__).parent.glob("test_golden_*.py")]
    assert COVERED.union(*(m.COVERED for m in modules)) == set(HEADS.values())


# Figures of an independent float64 script that also ran the public implementations named beside each case, to 6
# decimals: losses of the rows, and the gradient of their mean with respect to each response's summed log-prob.

PAIR_VECTORS: list[tuple[Head, list[float], list[float], list[float]]] = [
    # TRL 1.16 sigmoid, HALOs, eric-mitchell, NCA repo, open-instruct, f-DPO repo, Liger
    (
        DPO(beta=0.1),
        [0.632599, 0.825939, 0.623273],
        [-0.015626, -0.018739, -0.015460],
        [0.015626, 0.018739, 0.015460],
    ),
    # eric-mitchell, HALOs CDPO; TRL 1.16 ignores label_smoothing
    (
        DPO(beta=0.1, label_smoothing=0.1),
        [0.645099, 0.800939, 0.637773],
        [-0.012293, -0.015406, -0.012127],
        [0.012293, 0.015406, 0.012127],
    ),
    # eric-mitchell, DiscoPOP repo
    (
        IPO(tau=0.1),
        [14.062500, 56.250000, 12.602500],
        [-2.500000, -5.000000, -2.366667],
        [2.500000, 5.000000, 2.366667],
    ),
    # TRL 1.16, HALOs
    (
        IPO(tau=0.1, length_normalize=True),
        [22.800625, 28.460320, 21.045156],
        [-0.636667, -0.444568, -1.019444],
        [0.530556, 0.508078, 0.764583],
    ),
    # TRL 1.16
    (
        APOZero(beta=0.1),
        [0.968761, 1.062419, 0.963767],
        [-0.008328, -0.008301, -0.008326],
        [0.008322, 0.008301, 0.008318],
    ),
    # TRL 1.16
    (
        APODown(beta=0.1),
        [0.981288, 1.030967, 0.978809],
        [0.000027, 0.000096, 0.000036],
        [0.008301, 0.008204, 0.008290],
    ),
]
NCA_PAIR = (  # TRL 1.16 nca_pair, NCA repo
    NCA(beta=0.1, alpha=1e4),
    [1.355865, 1.452698, 1.351171],
    [-0.007708, -0.009894, -0.007584],
    [0.008021, 0.008853, 0.007979],
)

SET_VECTORS: list[tuple[Head, float, list[float]]] = [
    # NCA repo
    (InfoNCA(beta=0.1, alpha=1.0), 1.339322, [-0.036024, 0.010185, 0.002985, 0.022853]),
    (NCA(beta=0.1, alpha=1.0), 1.362671, [-0.017781, 0.005011, 0.001257, 0.011794]),
    (InfoNCA(beta=0.1, alpha=0.5), 1.352136, [-0.020246, 0.001997, -0.002421, 0.020669]),
    (NCA(beta=0.1, alpha=0.5), 1.369086, [-0.010089, 0.000815, -0.001412, 0.010648]),
    # NCA repo with temperature_alpha=1e-4
    (InfoNCA(beta=0.1, alpha=1e4), 1.319314, [-0.073268, 0.024188, 0.026072, 0.023008]),
    (NCA(beta=0.1, alpha=1e4), 1.352720, [-0.035938, 0.012188, 0.012656, 0.011876]),
    # no public counterpart
    (MPOMulti(beta=0.1, power=0), 0.261473, [-0.007989, -0.007228, -0.007791, 0.023008]),
    (MPOMulti(beta=0.1, alpha=0.5, power=1, signed=True), 0.021003, [-0.001029, -0.000440, -0.000609, 0.002078]),
    (MPOMulti(beta=0.1, alpha=0.5, power=1), 0.704416, [-0.025043, -0.010704, -0.014814, 0.050560]),
    (MPOMulti(beta=0.1, alpha=0.1, power=2), 0.726428, [-0.022415, -0.013426, -0.015795, 0.051637]),
]


@pytest.mark.parametrize(("head", "rows", "better", "worse"), [*PAIR_VECTORS, NCA_PAIR], ids=lambda v: str(v)[:40])
def test_pair_vectors(head: Head, rows: list[float], better: list[float], worse: list[float]) -> None:
    check_pair_vector(head, rows, better, worse)


@pytest.mark.parametrize(("head", "loss", "grad"), SET_VECTORS, ids=lambda v: str(v)[:60])
def test_set_vectors(head: Head, loss: float, grad: list[float]) -> None:
    check_set_vector(head, loss, grad)


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (DPO(beta=0.1), 0.693147, [-0.05, 0.05]),
        (DPO(beta=0.1, label_smoothing=0.3), 0.693147, [-0.02, 0.02]),
        (IPO(tau=0.1), 25.0, [-10.0, 10.0]),
        (NCA(beta=0.1, alpha=1e4), 1.386294, [-0.025, 0.025]),
        (APOZero(beta=0.1), 1.0, [-0.025, 0.025]),
        (APODown(beta=0.1), 1.0, [0.0, 0.025]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_values_at_policy_equals_reference(head: Head, loss: float, grad: list[float]) -> None:
    loss_G, grad_T = loss_and_grad(head, input_from_logratios([[0.0, 0.0]], [[1.0, 0.0]]))
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        (InfoNCA(beta=0.1), 1.386294),
        (NCA(beta=0.1), 1.386294),
        (MPOMulti(beta=0.1, power=0), 0.693147),
    ],
    ids=lambda v: str(v)[:40],
)
def test_set_values_at_policy_equals_reference(head: Head, loss: float) -> None:
    """Four responses, two of them above the mean."""
    loss_G, _ = loss_and_grad(head, input_from_logratios([[0.0] * 4], [[4.0, 3.0, 2.0, 1.0]]))
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)

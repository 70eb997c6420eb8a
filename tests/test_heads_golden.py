"""Loss and gradient of each head against its paper's formula, written out here in mpmath without any of po's code.

The formulas are the naive ones (exp, log, sums over lists) at 50 digits; gradients are central differences with a step
of 1e-20. Inputs are random and ragged. The second half compares with figures that were computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads_support import (
    F64,
    Lengths,
    grid,
    input_from_logratios,
    loss_and_grad,
    name_of,
    random_input,
    segments,
)
from mpmath import exp, log, mp, mpf
from torch.testing import assert_close

from po.heads import HEADS
from po.heads.apo_down import APODown
from po.heads.apo_zero import APOZero
from po.heads.dpo import DPO
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.mpo import MPO
from po.heads.nca import NCA
from po.heads.sft import SFT
from po.types import Head, HeadInput

Response = list[mpf]  # log pi/ref of each token
Formula = Callable[[list[Response], list[mpf]], mpf]  # log-ratios and rewards of one group -> its loss


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + exp(-x))


def softmax(xs: list[mpf]) -> list[mpf]:
    return [exp(x) / sum(exp(y) for y in xs) for x in xs]


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
    (MPO(beta=0.3, power=0), mpo(0.3, lambda d: mpf(1))),
    (MPO(beta=0.1, alpha=0.5, power=1), mpo(0.1, lambda d: exp(abs(d) / 2))),
    (MPO(beta=0.1, alpha=0.5, power=1, signed=True), mpo(0.1, lambda d: exp(d / 2))),
    (MPO(beta=0.1, alpha=0.25, power=2), mpo(0.1, lambda d: exp(d**2 / 4))),
    (APOZero(beta=0.1), apo_zero(0.1)),
    (APOZero(beta=2.0), apo_zero(2)),
    (APODown(beta=0.1), apo_down(0.1)),
    (APODown(beta=2.0), apo_down(2)),
]
RAGGED: dict[str, Lengths] = {
    "pair": ((3, 5), (1, 2), (4, 1), (1, 1)),
    "set": ((2, 1, 3, 1, 2, 1), (1, 3), (2, 1, 1), (2,)),
}


def expected(formula: Formula, x: HeadInput) -> tuple[list[float], list[float]]:
    """Losses per group, and the gradient of their mean over groups per token."""
    G, K = x.seg.valid_GK.shape
    owner = x.seg.slot_T.tolist()
    logratio = [mpf(p) - mpf(r) for p, r in zip(x.policy_T.tolist(), x.ref_T.tolist(), strict=True)]

    def loss(g: int, values: list[mpf]) -> mpf:
        slots = [s for s in range(g * K, (g + 1) * K) if s in owner]
        tokens = [[v for v, s in zip(values, owner, strict=True) if s == slot] for slot in slots]
        rewards = [] if x.reward is None else [mpf(float(x.reward.flatten()[s])) for s in slots]
        return formula(tokens, rewards)

    step = mpf(10) ** -20
    grads = []
    for t, s in enumerate(owner):
        up, down = ([*logratio[:t], logratio[t] + d, *logratio[t + 1 :]] for d in (step, -step))
        grads.append(float((loss(s // K, up) - loss(s // K, down)) / (2 * step) / G))
    return [float(loss(g, logratio)) for g in range(G)], grads


@pytest.mark.parametrize(("head", "formula"), CASES, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_loss_and_gradient_are_the_paper_s(head: Head, formula: Formula) -> None:
    x = random_input(head.needs, RAGGED[head.needs.layout], seed=3)
    with mp.workdps(50):
        loss, grad = expected(formula, x)
    assert_close(loss_and_grad(head, x), (torch.tensor(loss, dtype=F64), torch.tensor(grad, dtype=F64)))


def test_sft_is_the_mean_over_the_best_responses_tokens() -> None:
    """Rewards pick response 1 of the first group and, tied, the first of the second; by hand."""
    x = input_from_logratios([[0.0, 0.0, 0.0], [0.0, 0.0]], [[1.0, 3.0, 2.0], [5.0, 5.0]], lengths=[[1, 2, 1], [3, 2]])
    policy_T = -torch.arange(1.0, 10.0, dtype=F64)  # -1 | -2 -3 | -4 || -5 -6 -7 | -8 -9
    x = HeadInput(x.seg, policy_T.requires_grad_(True), reward=x.reward)
    loss_T, grad_T = loss_and_grad(SFT(), x)
    assert_close(loss_T, -policy_T.detach())
    assert_close(grad_T, -torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0], dtype=F64) / 5)


def test_every_head_has_a_golden_test() -> None:
    assert {type(h) for h, _ in CASES} | {SFT} == set(HEADS.values())


# Figures of an independent float64 script that also ran the public implementations named beside each case, to 6
# decimals: losses of the rows, and the gradient of their mean with respect to each response's summed log-prob.

PAIR_LOGP = [[-12.5, -14.0], [-20.25, -18.5], [-8.0, -9.75]]
PAIR_REF = [[-13.0, -13.25], [-19.0, -19.75], [-8.6, -8.9]]
PAIR_LENGTHS = ((5, 6), (8, 7), (3, 4))
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

SET_LOGP, SET_REF = [[-10.0, -12.0, -11.0, -15.0]], [[-10.5, -11.5, -11.25, -14.0]]
SET_REWARD, SET_LENGTHS = [[8.0, 6.5, 7.0, 2.0]], ((4, 6, 5, 7),)
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
    (MPO(beta=0.1, power=0), 0.261473, [-0.007989, -0.007228, -0.007791, 0.023008]),
    (MPO(beta=0.1, alpha=0.5, power=1, signed=True), 0.021003, [-0.001029, -0.000440, -0.000609, 0.002078]),
    (MPO(beta=0.1, alpha=0.5, power=1), 0.704416, [-0.025043, -0.010704, -0.014814, 0.050560]),
    (MPO(beta=0.1, alpha=0.1, power=2), 0.726428, [-0.022415, -0.013426, -0.015795, 0.051637]),
]


def from_sums(
    logp: list[list[float]], ref: list[list[float]], lengths: Lengths, reward: list[list[float]]
) -> HeadInput:
    """Summed log-probs spread evenly over the tokens: the gradient of a sum is the gradient of each of its tokens."""
    seg = segments(lengths)
    per_token = [seg.spread(grid(v) / seg.length_GK) for v in (logp, ref)]
    return HeadInput(seg, per_token[0].requires_grad_(True), ref=per_token[1], reward=grid(reward))


@pytest.mark.parametrize(("head", "rows", "better", "worse"), [*PAIR_VECTORS, NCA_PAIR], ids=lambda v: str(v)[:40])
def test_pair_vectors(head: Head, rows: list[float], better: list[float], worse: list[float]) -> None:
    x = from_sums(PAIR_LOGP, PAIR_REF, PAIR_LENGTHS, [[1.0, 0.0]] * 3)
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor(rows, dtype=F64), rtol=0, atol=6e-7)
    grad_GK = torch.tensor([better, worse], dtype=F64).T.contiguous()
    assert_close(grad_T, x.seg.spread(grad_GK), rtol=0, atol=6e-7)


@pytest.mark.parametrize(("head", "loss", "grad"), SET_VECTORS, ids=lambda v: str(v)[:60])
def test_set_vectors(head: Head, loss: float, grad: list[float]) -> None:
    x = from_sums(SET_LOGP, SET_REF, SET_LENGTHS, SET_REWARD)
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor([grad], dtype=F64)), rtol=0, atol=6e-7)


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
        (MPO(beta=0.1, power=0), 0.693147),
    ],
    ids=lambda v: str(v)[:40],
)
def test_set_values_at_policy_equals_reference(head: Head, loss: float) -> None:
    """Four responses, two of them above the mean."""
    loss_G, _ = loss_and_grad(head, input_from_logratios([[0.0] * 4], [[4.0, 3.0, 2.0, 1.0]]))
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)

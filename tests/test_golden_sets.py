"""Loss and gradient of the heads on sets and labelled groups against their formulas (tests/heads_golden.py), and
against figures that were computed elsewhere."""

from __future__ import annotations

import pytest
import torch
from heads_golden import (
    SET_LENGTHS,
    SET_LOGP,
    SET_REF,
    Formula,
    Objective,
    Response,
    check_formula,
    check_objective,
    check_set_vector,
    from_sums,
    sigmoid,
    softmax,
    token_values,
)
from heads_support import F64, change, grid, input_from_logratios, loss_and_grad, name_of, random_input
from mpmath import exp, log, mpf
from torch.testing import assert_close

from po.heads.ampo import AMPO
from po.heads.irpo_incontext import IRPOInContext
from po.heads.mdpo_multisample import MDPOMultisample
from po.heads.mipo_multisample import MIPOMultisample
from po.heads.plackett_luce import PlackettLuce
from po.heads.ranklist import RankList
from po.heads.refa import REFA
from po.heads.spo_degree import SPODegree
from po.types import Head, HeadInput

SIDED = ((3, 1, 4, 2), (2, 5), (1, 1, 1, 2, 1), (6,))  # lengths of the labelled responses
SIGNS = [[1.0, -1.0, 0.0, 1.0], [-1.0, 1.0], [-1.0, -1.0, 1.0, -1.0, 0.0], [1.0]]


def ampo(beta: float, alpha: float, mean: bool) -> Formula:
    def loss(lp: list[Response], reward: list[mpf]) -> mpf:
        average = sum(reward) / len(reward)
        scores = [sum(t) / len(t) if mean else sum(t) for t in lp]
        terms = [exp(beta * (s + mpf(alpha) * (r - average))) for s, r in zip(scores, reward, strict=True)]
        return -log(sum(t for t, r in zip(terms, reward, strict=True) if r == max(reward)) / sum(terms))

    return loss


def refa(beta: float, alpha: float, gamma: float, power: int) -> Formula:
    def loss(lp: list[Response], reward: list[mpf]) -> mpf:
        average = sum(reward) / len(reward)
        weighed = [mpf(alpha) * (r - average) ** power for r in reward]
        terms = [exp(beta * (sum(t) / len(t) + w)) for t, w in zip(lp, weighed, strict=True)]
        above = sum(t for t, r in zip(terms, reward, strict=True) if r > average)
        below = sum(t for t, r in zip(terms, reward, strict=True) if r <= average)
        return -log(above / (above + gamma * below)) if above else mpf(0)

    return loss


def irpo(beta: float) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        total, N = mpf(0), len(u)
        for i in range(N if N > 1 else 0):
            weight = (2 ** max(reward[i], mpf(0)) - 1) / log(1 + 1 + sum(r > reward[i] for r in reward), 2)
            others = sum(exp(beta * (sum(u[j]) - sum(u[i]))) for j in range(N) if j != i)
            total -= weight * log(sigmoid(-(log(others) - log(N - 1)))) / N
        return total

    return loss


def ranked(u: list[Response], reward: list[mpf], beta: float) -> list[mpf]:
    """The implicit rewards, best first."""
    return [beta * sum(u[k]) for k in sorted(range(len(u)), key=lambda k: -reward[k])]


def plackett_luce(beta: float) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        r = ranked(u, reward, beta)
        return -sum(log(softmax(r[i:])[0]) for i in range(len(r)))

    return loss


def ranklist(beta: float, skip: int) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        r = ranked(u, reward, beta)
        return sum(log(1 + sum(exp(s - r[i]) for s in r[i + 1 : i + 1 + skip])) for i in range(len(r)))

    return loss


SET_CASES: list[tuple[Head, Formula]] = [
    (AMPO(), ampo(5, 0.1, mean=True)),
    (AMPO(beta=0.3, alpha=0.7, length_normalize=False), ampo(0.3, 0.7, mean=False)),
    (AMPO(beta=2.0, alpha=0.0), ampo(2, 0, mean=True)),
    (REFA(), refa(5, 0.1, 2, 1)),
    (REFA(beta=2.0, alpha=0.3, gamma=1.0), refa(2, 0.3, 1, 1)),
    (REFA(beta=2.0, alpha=0.3, gamma=3.0, power=2), refa(2, 0.3, 3, 2)),
    (IRPOInContext(), irpo(1)),
    (IRPOInContext(beta=0.02), irpo(mpf(0.02))),
    (PlackettLuce(beta=0.1), plackett_luce(0.1)),
    (PlackettLuce(beta=2.0), plackett_luce(2)),
    (RankList(beta=0.3), ranklist(0.3, 1)),
    (RankList(beta=0.3, skip=2), ranklist(0.3, 2)),
    (RankList(beta=0.3, skip=9), ranklist(0.3, 9)),
]


@pytest.mark.parametrize(("head", "formula"), SET_CASES, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_set_losses_are_their_formulas(head: Head, formula: Formula) -> None:
    check_formula(head, formula)


def labelled(head: Head) -> HeadInput:
    """Groups with one and several responses on a side, unlabelled ones, and one that lacks a side."""
    return change(random_input(head, SIDED, seed=7), label=grid(SIGNS, empty=0).long())


def sides(x: HeadInput, policy: list[mpf]) -> list[tuple[list[mpf], list[mpf]]]:
    """The log-ratios of each group's responses labelled +1 and -1."""
    u = token_values(x, [p - mpf(r) for p, r in zip(policy, x.ref_T.tolist(), strict=True)])
    return [
        tuple([sum(t) for t, s in zip(group, signs, strict=True) if s == sign] for sign in (1, -1))
        for group, signs in zip(u, SIGNS, strict=True)
    ]  # type: ignore[misc]


def mean(xs: list[mpf]) -> mpf:
    return sum(xs) / len(xs)


def mdpo(x: HeadInput, beta: float) -> Objective:
    def losses(policy: list[mpf]) -> list[mpf]:
        return [-log(sigmoid(beta * (mean(w) - mean(v)))) if w and v else mpf(0) for w, v in sides(x, policy)]

    return losses


def mipo(x: HeadInput, tau: float, unbiased: bool) -> Objective:
    def noise(xs: list[mpf]) -> mpf:
        n = len(xs)
        return sum((v - mean(xs)) ** 2 for v in xs) / (n - 1) / n if unbiased and n > 1 else mpf(0)

    def losses(policy: list[mpf]) -> list[mpf]:
        both = sides(x, policy)
        squares = [(mean(w) - mean(v) - 1 / (2 * mpf(tau))) ** 2 if w and v else mpf(0) for w, v in both]
        return [s - noise(w) - noise(v) if w and v else s for s, (w, v) in zip(squares, both, strict=True)]

    return losses


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_mdpo_is_dpo_of_means(beta: float) -> None:
    x = labelled(MDPOMultisample())
    check_objective(MDPOMultisample(beta=beta), mdpo(x, beta), x)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_mipo_is_ipo_of_means_less_their_variance(tau: float, unbiased: bool) -> None:
    x = labelled(MIPOMultisample())
    check_objective(MIPOMultisample(tau=tau, unbiased=unbiased), mipo(x, tau, unbiased), x)


@pytest.mark.parametrize("classes", [2, 4])
def test_spo_degree_adds_a_classification_of_the_degrees(classes: int) -> None:
    """The unlabelled responses of the first and third group lack 1 and 3 parts (clamped to 1 of two classes)."""
    head = SPODegree(beta=0.3, gamma=0.7, classes=classes)  # type: ignore[arg-type]
    x = change(labelled(head), columns={"removed": torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=F64)})
    gates = [token_values(x, [mpf(v) for v in x.gate_T(f"degree_{c}").tolist()]) for c in range(classes)]
    removed = [1, 2, 3, 0]

    def losses(policy: list[mpf]) -> list[mpf]:
        out = []
        for g, align in enumerate(mdpo(x, 0.3)(policy)):
            told = mpf(0)
            for k, sign in enumerate(SIGNS[g]):
                z = [sum(gates[c][g][k]) / len(gates[c][g][k]) for c in range(classes)]
                degree = min(removed[g], classes - 1) if sign == 0 else 0
                told -= log(softmax(z)[degree]) / len(SIGNS[g])
            out.append(align + mpf(0.7) * told)
        return out

    check_objective(head, losses, x)


def test_spo_degree_trains_its_linear_layer_on_the_last_layer_alone() -> None:
    """Hidden states of three layers, two tokens: by hand."""
    module = SPODegree(classes=2).build(hidden_size=2, layers=3).double()
    with torch.no_grad():
        module.linear.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
        module.linear.bias.copy_(torch.tensor([0.25, 0.0]))
    hidden_TLD = torch.tensor([[[9.0, 9.0], [8.0, 8.0], [1.0, 3.0]], [[9.0, 9.0], [8.0, 8.0], [0.0, -2.0]]], dtype=F64)
    gates = module(hidden_TLD)
    assert gates["degree_0"].tolist() == [7.25, -3.75]
    assert gates["degree_1"].tolist() == [0.5, -1.0]


COVERED: set[type[Head]] = {type(h) for h, _ in SET_CASES} | {MDPOMultisample, MIPOMultisample, SPODegree}


# Figures of an independent float64 script, to 6 decimals; code that also ran is named beside the case.


def test_refa_vector() -> None:
    head = REFA(beta=5.0, alpha=0.1, gamma=2.0)
    check_set_vector(head, 0.060802, [-0.007784, -0.029863, -0.016928, 0.042136])


def check_vector(head: Head, x: HeadInput, loss: float, grad: list[float]) -> None:
    """Loss of one group, and its gradient with respect to each response's summed log-prob."""
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor([grad], dtype=F64)), rtol=0, atol=6e-7)


def test_ampo_vectors() -> None:
    """The best response against the two worst (S without its response 2); sums, then means."""
    pick = [0, 1, 3]
    x = from_sums([[SET_LOGP[0][k] for k in pick]], [[SET_REF[0][k] for k in pick]], [[4, 6, 7]], [[8.0, 6.5, 2.0]])
    head = AMPO(beta=0.1, alpha=0.5, length_normalize=False)
    check_vector(head, x, 0.792495, [-0.054729, 0.034387, 0.020342])
    x = from_sums([[-12.3, -15.1, -20.4]], [[0.0] * 3], [[7, 9, 11]], [[1.2, -0.4, -1.5]])
    check_vector(AMPO(beta=1.0, alpha=1.0), x, 0.246502, [-0.03121, 0.01898, 0.004332])


def test_irpo_vector() -> None:
    """The authors' code agrees."""
    x = from_sums(SET_LOGP, SET_REF, SET_LENGTHS, [[3.0, 2.0, 1.0, 0.0]])
    check_vector(IRPOInContext(beta=1.0), x, 1.212672, [-0.364377, -0.146000, 0.379919, 0.130458])


@pytest.mark.parametrize(
    ("head", "loss", "better", "worse"),
    [
        (MDPOMultisample(beta=0.1), 0.632599, [-0.023440, -0.023440], [0.023440, 0.023440]),
        (MIPOMultisample(tau=0.1, unbiased=False), 14.062500, [-3.750000, -3.750000], [3.750000, 3.750000]),
        (MIPOMultisample(tau=0.1), 14.031250, [-3.625000, -3.875000], [3.875000, 3.625000]),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_multisample_vectors(head: Head, loss: float, better: list[float], worse: list[float]) -> None:
    """The better group stands in places 0 and 2, the worse one in 1 and 3."""
    logp, ref = [[-12.5, -14.0, -11.0, -15.5]], [[-13.0, -13.25, -11.75, -15.0]]
    x = change(from_sums(logp, ref, [[2, 3, 1, 4]], [[0.0] * 4]), label=torch.tensor([[1, -1, 1, -1]]))
    check_vector(head, x, loss, [better[0], worse[0], better[1], worse[1]])


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (MDPOMultisample(beta=0.1), 0.693147, [-0.025, 0.025, -0.025, 0.025]),
        (MIPOMultisample(tau=0.1), 25.0, [-5.0, 5.0, -5.0, 5.0]),
        (PlackettLuce(beta=0.1), 3.178054, [-0.075, 0.108333, -0.041667, 0.008333]),  # log 4!
        (RankList(beta=0.1), 2.079442, [-0.05, 0.05, 0.0, 0.0]),  # 3 log 2
        (IRPOInContext(), 1.627646, [-0.775300, 0.391366, 0.075901, 0.308033]),  # log 2 (7 + 3 / log2(3) + 1 / 2) / 4
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_values_at_policy_equals_reference(head: Head, loss: float, grad: list[float]) -> None:
    """Relevances 3, 0, 2, 1: the ranking is 0, 2, 3, 1; labels +1, -1, +1, -1."""
    x = change(input_from_logratios([[0.0] * 4], [[3.0, 0.0, 2.0, 1.0]]), label=torch.tensor([[1, -1, 1, -1]]))
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)

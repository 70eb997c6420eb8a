"""Loss and gradient of the heads without a reference against their formulas, in mpmath and without any code of po, and
against figures that were computed elsewhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from heads_golden import (
    PAIR_LENGTHS,
    PAIR_LOGP,
    PAIR_REF,
    Formula,
    Response,
    check_formula,
    check_pair_vector,
    from_sums,
)
from heads_support import F64, loss_and_grad, name_of, segments
from mpmath import exp, log, mpf
from torch.testing import assert_close

from po.heads.alphapo import AlphaPO
from po.heads.cpo import CPO
from po.heads.orpo import ORPO
from po.heads.simpo import SimPO
from po.heads.slic import SLiC
from po.heads.tpo_l import TPOL
from po.heads.tpo_triple import TPOTriple
from po.numeric import log1mexp
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {ORPO, SimPO, AlphaPO, CPO, SLiC, TPOTriple, TPOL}


def mean(tokens: Response) -> mpf:
    return sum(tokens) / len(tokens)


def logistic(margin: mpf) -> mpf:
    return log(1 + exp(-margin))


def orpo(lam: float) -> Formula:
    def loss(y: list[Response], _: list[mpf]) -> mpf:
        odds = [exp(mean(t)) / (1 - exp(mean(t))) for t in y]
        return -mean(y[0]) + mpf(lam) * logistic(log(odds[0] / odds[1]))

    return loss


def simpo(beta: float, gamma: float) -> Formula:
    return lambda y, _: logistic(mpf(beta) * (mean(y[0]) - mean(y[1])) - mpf(gamma))


def alphapo(beta: float, gamma: float, alpha: float) -> Formula:
    def reward(tokens: Response) -> mpf:
        return (1 - exp(mean(tokens)) ** -mpf(alpha)) / mpf(alpha)

    return lambda y, _: logistic(mpf(beta) * (reward(y[0]) - reward(y[1])) - mpf(gamma))


def cpo(beta: float, alpha: float) -> Formula:
    return lambda y, _: logistic(mpf(beta) * (sum(y[0]) - sum(y[1]))) - mpf(alpha) * mean(y[0])


def slic(delta: float, lam: float) -> Formula:
    return lambda y, _: max(mpf(0), mpf(delta) - sum(y[0]) + sum(y[1])) - mpf(lam) * sum(y[0])


def triple(y: list[Response], reward: list[mpf]) -> tuple[Response, Response, Response]:
    """Gold, chosen, rejected. Random rewards have no ties."""
    ranked = [t for _, t in sorted(zip(reward, y, strict=True), key=lambda pair: -pair[0])]
    return ranked[0], ranked[1] if len(y) > 2 else ranked[0], ranked[-1]


def tpo(beta: float, alpha: float) -> Formula:
    def loss(y: list[Response], reward: list[mpf]) -> mpf:
        gold, chosen, rejected = triple(y, reward)
        return logistic(mpf(beta) * (sum(chosen) - sum(rejected))) - mpf(alpha) * mean(gold)

    return loss


def tpo_l(beta: float, gamma: float, alpha: float) -> Formula:
    def loss(y: list[Response], reward: list[mpf]) -> mpf:
        gold, chosen, rejected = triple(y, reward)
        return logistic(mpf(beta) * (mean(chosen) - mean(rejected)) - mpf(gamma)) - mpf(alpha) * mean(gold)

    return loss


@pytest.mark.parametrize(
    ("head", "formula"),
    [
        (ORPO(), orpo(0.1)),
        (ORPO(lam=2.0), orpo(2)),
        (SimPO(), simpo(2, 0.5)),
        (SimPO(beta=10.0, gamma=3.0), simpo(10, 3)),
        (AlphaPO(), alphapo(2.5, 0.25, 0.25)),
        (AlphaPO(alpha=-0.5, beta=1.0, gamma=0.0), alphapo(1, 0, -0.5)),
        (AlphaPO(alpha=0), simpo(2.5, 0.25)),
        (CPO(), cpo(0.1, 1)),
        (CPO(beta=0.7, alpha=0.3), cpo(0.7, 0.3)),
        (SLiC(), slic(1, 0.1)),
        (SLiC(delta=6.0, lam=0.0), slic(6, 0)),
        (TPOTriple(), tpo(0.01, 1)),
        (TPOTriple(beta=0.7, alpha=0.05), tpo(0.7, 0.05)),
        (TPOL(), tpo_l(2, 0.5, 1)),
        (TPOL(beta=0.7, gamma=2.0, alpha=0.05), tpo_l(0.7, 2, 0.05)),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_loss_and_gradient_are_the_paper_s(head: Head, formula: Formula) -> None:
    check_formula(head, formula)


SIMPO = ([1.194218, 0.841086, 1.282973], [-0.092941, -0.047397, -0.160620], [0.077451, 0.054167, 0.120465])
CPO_01 = ([0.620957, 0.784470, 0.609470], [-0.015419, -0.018121, -0.015212], [0.015419, 0.018121, 0.015212])
Rows = list[float]
PAIR_VECTORS: list[tuple[Head, tuple[Rows, Rows, Rows]]] = [
    # the authors' repository, HALOs; TRL 1.16 CPOTrainer
    (SimPO(beta=2.0, gamma=0.5), SIMPO),
    (AlphaPO(beta=2.0, gamma=0.5, alpha=0), SIMPO),
    # TRL 1.16 CPOTrainer.cpo_loss with alpha 0.25 and -0.5
    (
        AlphaPO(beta=2.5, gamma=0.25, alpha=0.25),
        (
            [1.322372, 0.561728, 1.568239],
            [-0.228392, -0.084294, -0.428279],
            [0.182560, 0.099062, 0.303324],
        ),
    ),
    (
        AlphaPO(beta=2.0, gamma=0.5, alpha=-0.5),
        (
            [1.037226, 0.936403, 1.055662],
            [-0.024661, -0.014290, -0.038195],
            [0.022337, 0.015445, 0.032124],
        ),
    ),
    # TRL 1.16 CPO; TPO repository
    (CPO(beta=0.1, alpha=0), CPO_01),
    (TPOTriple(beta=0.1, alpha=0), CPO_01),
    # TRL 1.16 odds_ratio_loss (single precision) + the response's own mean
    (
        ORPO(lam=0.1),
        (
            [2.578884, 2.594712, 2.749181],
            [-0.070629, -0.043794, -0.117820],
            [0.003357, 0.002409, 0.005130],
        ),
    ),
    # no public counterpart
    (
        SLiC(delta=1.0, lam=0.1),
        (
            [1.250000, 4.775000, 0.800000],
            [-0.033333, -0.366667, -0.033333],
            [0.000000, 0.333333, 0.000000],
        ),
    ),
    (TPOL(beta=2.0, gamma=0.5, alpha=0), SIMPO),
]


@pytest.mark.parametrize(("head", "figures"), PAIR_VECTORS, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_pair_vectors(head: Head, figures: tuple[Rows, Rows, Rows]) -> None:
    check_pair_vector(head, *figures)


def test_the_gold_response_adds_its_likelihood() -> None:
    """A third response of reward 2 before each pair: the contrast keeps its figures, and alpha times its mean comes on
    top, with gradient -alpha / (3 |y_g|) for each of its tokens' sum."""
    gold, lengths = [[-6.0], [-2.0], [-9.0]], tuple((3, *pair) for pair in PAIR_LENGTHS)
    x = from_sums(
        [[*g, *p] for g, p in zip(gold, PAIR_LOGP)], [[0.0, *p] for p in PAIR_REF], lengths, [[2.0, 1.0, 0.0]] * 3
    )
    for head, (rows, better, worse) in ((TPOTriple(beta=0.1, alpha=0.4), CPO_01), (TPOL(alpha=0.4), SIMPO)):
        loss_G, grad_T = loss_and_grad(head, x)
        own_G = torch.tensor([0.4 * 6.0 / 3, 0.4 * 2.0 / 3, 0.4 * 9.0 / 3], dtype=F64)
        assert_close(loss_G, torch.tensor(rows, dtype=F64) + own_G, rtol=0, atol=6e-7)
        grad_GK = torch.tensor([[-0.4 / 9] * 3, better, worse], dtype=F64).T.contiguous()
        assert_close(grad_T, x.seg.spread(grad_GK), rtol=0, atol=6e-7)


def of_means(means: list[list[float]], n: int = 2, reward: list[list[float]] | None = None) -> HeadInput:
    """Responses of n tokens each with these log-probs."""
    seg = segments([[n] * len(row) for row in means])
    policy_T = torch.tensor(means, dtype=F64).flatten().repeat_interleave(n)
    scores = None if reward is None else torch.tensor(reward, dtype=F64)
    return HeadInput(seg, policy_T.requires_grad_(True), reward=scores)


def test_values_where_both_responses_are_equally_likely() -> None:
    """Without a reference this is the neutral point: the contrasts see no difference. By hand."""
    x = of_means([[-1.5, -1.5]], reward=[[1.0, 0.0]])
    half = math.log(2)
    odds = 1 + math.exp(-1.5) / (1 - math.exp(-1.5))  # d log-odds / d m
    for head, loss, better, worse in (
        (ORPO(), 1.5 + 0.1 * half, -1 - 0.05 * odds, 0.05 * odds),
        (SimPO(gamma=0), half, -1.0, 1.0),
        (SimPO(), math.log(1 + math.exp(0.5)), -2 / (1 + math.exp(-0.5)), 2 / (1 + math.exp(-0.5))),
        (AlphaPO(gamma=0), half, -1.25 * math.exp(1.5 / 4), 1.25 * math.exp(1.5 / 4)),
        (CPO(), half + 1.5, -2 * 0.05 - 1, 2 * 0.05),
        (SLiC(), 1 + 0.1 * 3, -2 * 1.1, 2.0),
        (TPOTriple(), half + 1.5, -2 * 0.005 - 1, 2 * 0.005),
        (TPOL(gamma=0), half + 1.5, -2.0, 1.0),
    ):
        loss_G, grad_T = loss_and_grad(head, x)
        assert_close(loss_G, torch.tensor([loss], dtype=F64), msg=name_of(head))
        expected_T = torch.tensor([better, worse], dtype=F64).repeat_interleave(2) / 2
        assert_close(grad_T, expected_T, msg=name_of(head))


def test_log1mexp_at_both_ends() -> None:
    """Single precision, to a few units in the last place; the naive log(1 - exp(x)) gives -inf at -1e-9."""
    x = torch.tensor([-1e-9, -1e-6, -0.5, -math.log(2), -0.7, -20.0, -200.0], requires_grad=True)
    expected = [float(log(1 - exp(mpf(v)))) for v in x.tolist()]
    slopes = [float(-exp(mpf(v)) / (1 - exp(mpf(v)))) for v in x.tolist()]
    found = log1mexp(x)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert found.tolist() == pytest.approx(expected, rel=3e-7, abs=1e-44)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-44)


def test_orpo_of_a_response_known_by_heart() -> None:
    """A mean log-prob of 0 has infinite odds; the head caps them at 13.8, and its likelihood term goes on."""
    loss_G, grad_T = loss_and_grad(ORPO(), of_means([[0.0, -1.0]]))
    odds = -1.0 - math.log(1 - math.exp(-1.0))
    expected = 0.1 * math.log(1 + math.exp(-(-math.log(1e-6) - odds)))
    assert loss_G.tolist() == pytest.approx([expected], rel=1e-5)
    assert grad_T[:2].tolist() == [-0.5, -0.5]
    assert (grad_T[2:] > 0).all()

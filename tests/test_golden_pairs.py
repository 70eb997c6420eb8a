"""Loss and gradient of DPO's relatives against their papers' formulas. Figures: tests/test_vectors_pairs.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads_golden import (
    RAGGED,
    Formula,
    Response,
    check_formula,
    check_objective,
    sigmoid,
    softmax,
    token_values,
)
from heads_support import (
    F64,
    change,
    name_of,
    random_input,
)
from mpmath import exp, log, mpf, sqrt

from po.heads.bvpo import BVPO
from po.heads.cream import CREAM
from po.heads.dpo_norm import DPONorm
from po.heads.dpop import DPOP
from po.heads.exo_pref import EXOPref
from po.heads.exo_rw import EXORw
from po.heads.fdpo import FDPO
from po.heads.hinge import Hinge
from po.heads.hybrid_dpo import HybridDPO
from po.heads.ld_dpo import LDDPO
from po.heads.rdpo import RDPO
from po.heads.rpo_sft import RPOSft
from po.heads.sem_dpo import SemDPO
from po.heads.sppo_hard import SPPOHard
from po.heads.wpo import WPO
from po.heads.wpo_unaligned import WPOUnaligned
from po.types import Head, HeadInput


def rdpo(beta: float, e: float) -> Formula:
    def loss(u: list[Response], _: list[mpf]) -> mpf:
        h = sum(u[0]) - sum(u[1])
        right, flipped = -log(sigmoid(beta * h)), -log(sigmoid(-beta * h))
        return ((1 - mpf(e)) * right - mpf(e) * flipped) / (1 - 2 * mpf(e))

    return loss


def fdpo(beta: float, derivative: Callable[[mpf], mpf]) -> Formula:
    """derivative: f' as a function of u = pi/ref, with its constants."""
    return lambda u, _: -log(sigmoid(beta * (derivative(exp(sum(u[0]))) - derivative(exp(sum(u[1]))))))


def power(a: float) -> Callable[[mpf], mpf]:
    return lambda u: (1 - u ** -mpf(a)) / mpf(a)


def mean_dpo(beta: float) -> Formula:
    return lambda u, _: -log(sigmoid(beta * (sum(u[0]) / len(u[0]) - sum(u[1]) / len(u[1]))))


def ld_dpo(beta: float, a: float) -> Formula:
    def loss(u: list[Response], _: list[mpf]) -> mpf:
        m = min(len(r) for r in u)
        better, worse = (sum(r[:m]) + mpf(a) * sum(r[m:]) for r in u)
        return -log(sigmoid(beta * (better - worse)))

    return loss


def hinge(beta: float) -> Formula:
    return lambda u, _: max(mpf(0), 1 - beta * (sum(u[0]) - sum(u[1])))


def sppo_hard(beta: float) -> Formula:
    return lambda u, _: (sum(u[0]) - 1 / (2 * mpf(beta))) ** 2 + (sum(u[1]) + 1 / (2 * mpf(beta))) ** 2


def exo(beta: float, log_p: Callable[[list[mpf]], list[mpf]]) -> Formula:
    def loss(u: list[Response], reward: list[mpf]) -> mpf:
        q = softmax([beta * sum(r) for r in u])
        return sum(a * (log(a) - b) for a, b in zip(q, log_p(reward), strict=True))

    return loss


def smoothed(e: float) -> Callable[[list[mpf]], list[mpf]]:
    return lambda _: [log(1 - mpf(e)), log(mpf(e))]


def tempered(beta_r: float) -> Callable[[list[mpf]], list[mpf]]:
    return lambda reward: [log(p) for p in softmax([r / mpf(beta_r) for r in reward])]


def dpop(beta: float, lam: float) -> Formula:
    def loss(u: list[Response], _: list[mpf]) -> mpf:
        a, b = sum(u[0]), sum(u[1])
        return -log(sigmoid(beta * (a - b - lam * max(mpf(0), -a))))

    return loss


CASES: list[tuple[Head, Formula]] = [
    (RDPO(), rdpo(0.1, 0.1)),
    (RDPO(beta=0.7, epsilon=0.4), rdpo(0.7, 0.4)),
    (FDPO(), fdpo(0.1, lambda u: log(2 * u / (1 + u)))),
    (FDPO(divergence="reverse_kl"), fdpo(0.1, lambda u: log(u) + 1)),
    (FDPO(divergence="forward_kl"), fdpo(0.1, lambda u: -1 / u)),
    (FDPO(divergence="alpha"), fdpo(0.1, power(0.5))),
    (FDPO(beta=0.4, divergence="alpha", alpha=0.2), fdpo(0.4, power(0.2))),
    (DPONorm(), mean_dpo(5)),
    (DPONorm(beta=0.3), mean_dpo(0.3)),
    (LDDPO(), ld_dpo(0.1, 0.5)),
    (LDDPO(beta=0.8, alpha=0.0), ld_dpo(0.8, 0)),
    (Hinge(), hinge(0.1)),
    (Hinge(beta=2.0), hinge(2)),
    (SPPOHard(), sppo_hard(0.001)),
    (SPPOHard(beta=0.2), sppo_hard(0.2)),
    (EXOPref(), exo(0.1, smoothed(0.001))),
    (EXOPref(beta_pi=0.6, epsilon=0.2), exo(0.6, smoothed(0.2))),
    (EXOPref(beta_pi=0.5, labels="official"), exo(0.5, lambda _: [mpf(0), mpf(-10)])),
    (EXORw(), exo(0.5, tempered(0.5))),
    (EXORw(beta_pi=0.1, beta_r=3.0), exo(0.1, tempered(3))),
    (DPOP(), dpop(0.3, 50)),
    (DPOP(beta=0.1, lam=0.5), dpop(0.1, 0.5)),
]


@pytest.mark.parametrize(("head", "formula"), CASES, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_loss_and_gradient_are_the_paper_s(head: Head, formula: Formula) -> None:
    check_formula(head, formula)


# The heads below read more than log-ratios. A rule gives a pair's loss from its index, log pi by response and token,
# and log ref likewise.
Rule = Callable[[int, list[Response], list[Response]], mpf]


def margin(pi: list[Response], ref: list[Response]) -> mpf:
    return sum(pi[0]) - sum(pi[1]) - sum(ref[0]) + sum(ref[1])


def rpo_sft(beta: float, eta: float, token_mean: bool) -> Rule:
    def loss(_: int, pi: list[Response], ref: list[Response]) -> mpf:
        nll = -sum(pi[0])
        return -log(sigmoid(beta * margin(pi, ref))) + mpf(eta) * (nll / len(pi[0]) if token_mean else beta * nll)

    return loss


def hybrid(beta: float) -> Rule:
    def loss(_: int, pi: list[Response], ref: list[Response]) -> mpf:
        return -log(sigmoid(beta * (sum(pi[0]) - sum(pi[1]) - max(mpf(0), sum(ref[0]) - sum(ref[1])))))

    return loss


def weighted(beta: float, weight: Callable[[int], mpf]) -> Rule:
    return lambda g, pi, ref: -weight(g) * log(sigmoid(beta * margin(pi, ref)))


def cream(beta: float, c: list[float]) -> Rule:
    def loss(g: int, pi: list[Response], ref: list[Response]) -> mpf:
        z = beta * margin(pi, ref)
        return -mpf(c[g]) * log(sigmoid(z)) - (1 - mpf(c[g])) * log(sigmoid(-z))

    return loss


def check_rule(head: Head, x: HeadInput, rule: Rule) -> None:
    ref = token_values(x, [mpf(r) for r in x.ref_T.tolist()])

    def objective(policy: list[mpf]) -> list[mpf]:
        return [rule(g, pi, ref[g]) for g, pi in enumerate(token_values(x, policy))]

    check_objective(head, objective, x)


def ragged(head: Head) -> HeadInput:
    return random_input(head, RAGGED["pair"], seed=3)


@pytest.mark.parametrize(
    ("head", "rule"),
    [
        (RPOSft(), rpo_sft(0.01, 0.005, token_mean=False)),
        (RPOSft(beta=0.3, eta=0.2), rpo_sft(0.3, 0.2, token_mean=False)),
        (RPOSft(beta=0.5, eta=0.2, sft_reduction="token_mean"), rpo_sft(0.5, 0.2, token_mean=True)),
        (HybridDPO(), hybrid(0.1)),
        (HybridDPO(beta=1.0), hybrid(1)),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_loss_and_gradient_of_heads_that_read_raw_log_probs(head: Head, rule: Rule) -> None:
    x = ragged(head)
    if isinstance(head, HybridDPO):
        assert set(head(x).metrics["hybrid_dpo/clipped"].tolist()) == {0, 1}
    check_rule(head, x, rule)


@pytest.mark.parametrize("head", [WPO(), WPO(beta=0.5), WPO(clamp=True), WPOUnaligned(), WPOUnaligned(beta=0.5)])
def test_weighted_preference_optimization(head: WPO | WPOUnaligned) -> None:
    """The weights are constants of the gradient; the collision is such that some products exceed 1 and some do not."""
    x = ragged(head)
    if isinstance(head, WPO):
        x = change(x, collision=2.5 * x.collision_T)
    values = [mpf(p) for p in x.policy_T.tolist()]
    if isinstance(head, WPO):
        values = [p - mpf(c) for p, c in zip(values, x.collision_T.tolist(), strict=True)]
    weights = [exp(sum(sum(r) / len(r) for r in pair)) for pair in token_values(x, values)]
    if isinstance(head, WPO):
        assert min(weights) < 1 < max(weights)
        weights = [min(w, mpf(1)) for w in weights] if head.clamp else weights
    check_rule(head, x, weighted(head.beta, lambda g: weights[g]))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_cream(beta: float) -> None:
    c = [1.0, 0.0, 0.35, 0.5]
    x = change(ragged(CREAM()), columns={"consistency": torch.tensor(c, dtype=F64)})
    check_rule(CREAM(beta=beta), x, cream(beta, c))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_sem_dpo(alpha: float) -> None:
    head = SemDPO(alpha=alpha)
    x = ragged(head)

    def weight(g: int) -> mpf:
        a, b = ([mpf(v) for v in t[g].tolist()] for t in (x.prompt_embedding_GE, x.embedding_GKE[:, 0]))
        inner, size = sum(p * q for p, q in zip(a, b, strict=True)), sqrt(sum(p * p for p in a) * sum(q * q for q in b))
        return exp(-mpf(alpha) * (1 - inner / size))

    check_rule(head, x, weighted(0.1, weight))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_bvpo(alpha: float) -> None:
    source = [1, 0, 0, 1]
    x = change(ragged(BVPO()), columns={"thinking": torch.tensor(source, dtype=F64)})
    check_rule(BVPO(alpha=alpha), x, weighted(0.1, lambda g: mpf(alpha) if source[g] else 1 - mpf(alpha)))


COVERED: set[type[Head]] = {type(head) for head, _ in CASES}
COVERED |= {RPOSft, HybridDPO, WPO, WPOUnaligned, CREAM, SemDPO, BVPO}

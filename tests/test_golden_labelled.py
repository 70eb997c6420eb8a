"""Heads for scalar rewards, and for groups of good, bad and unlabelled responses, against their papers' formulas
(mpmath), and against figures that were computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads_golden import Objective, check_objective, sigmoid, token_values
from heads_support import F64, change, grid, input_from_logratios, loss_and_grad, name_of, random_input
from mpmath import log, mpf
from torch.testing import assert_close
from unpaired_support import (
    LOSE,
    LOSE_REF,
    WIN,
    WIN_REF,
    Made,
    check,
    given,
    groups,
    mean,
    sums,
)

from po.heads.d2o import D2O
from po.heads.dro_v import DROV
from po.heads.hypo_kl import HyPOKL
from po.heads.pmpo import PMPO
from po.heads.selm import SELM
from po.numeric import Value
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {DROV, PMPO, D2O, SELM, HyPOKL}


def dro_v(x: HeadInput, tau: float) -> Objective:
    values = [[r[0] for r in g] for g in token_values(x, [mpf(v) for v in x.gate_T("value").tolist()])]
    rewards = [[mpf(v) for v in g if v == v] for g in x.reward_GK.tolist()]  # NaN: no response

    def losses(policy: list[mpf]) -> list[mpf]:
        flat = [zip(*three, strict=True) for three in zip(rewards, values, sums(x, policy), strict=True)]
        return [(r - v - mpf(tau) * u) ** 2 / 2 for group in flat for r, v, u in group]

    return losses


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_dro_v(tau: float) -> None:
    """The value is that of each response's first token; it is trained by the negative residual."""
    head = DROV(tau=tau)
    x = random_input(head, ((3, 1, 4, 2), (2, 5), (1, 1, 1)), seed=3)
    value_T = torch.linspace(-1, 2, x.policy_T.numel(), dtype=F64).requires_grad_(True)
    x = change(x, gates={"value": value_T})
    check_objective(head, dro_v(x, tau), x)
    (grad_T,) = torch.autograd.grad(head(x).loss[x.seg.valid_GK].sum(), value_T)
    slots = x.seg.slot_T.tolist()
    first = torch.tensor([t == slots.index(s) for t, s in enumerate(slots)])
    u_T = x.seg.spread(x.logratio_GK.detach())
    assert_close(grad_T, torch.where(first, -(x.seg.spread(x.reward_GK) - value_T.detach() - tau * u_T), 0))


def test_dro_v_s_value_reads_the_last_layer_and_trains_nothing_below() -> None:
    module = DROV().build(4, 3)
    assert isinstance(module, Value)
    hidden_TLD = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert module(hidden_TLD)["value"].tolist() == [0] * 5
    with torch.no_grad():
        module.linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    value_T = module(hidden_TLD)["value"]
    assert_close(value_T, hidden_TLD.detach()[:, 2] @ torch.tensor([1.0, 2.0, 3.0, 4.0]))
    value_T.sum().backward()
    assert hidden_TLD.grad is None
    assert_close(module.linear.weight.grad, hidden_TLD.detach()[:, 2].sum(0, keepdim=True))


def pmpo(x: HeadInput, alpha: float, beta: float) -> Objective:
    kls = [[sum(r) for r in g] for g in token_values(x, [mpf(v) for v in x.token_kl_T.tolist()])]

    def group(logp: list[mpf], kl: list[mpf], label: list[int]) -> mpf:
        up = [v for v, s in zip(logp, label) if s > 0]
        down = [v for v, s in zip(logp, label) if s < 0]
        loss = mpf(beta) * mean(kl)
        loss -= mpf(alpha) * mean(up) if up else 0
        return loss + ((1 - mpf(alpha)) * mean(down) if down else 0)

    def losses(policy: list[mpf]) -> list[mpf]:
        return [group(*g) for g in zip(sums(x, policy, reference=False), kls, x.label_GK.tolist(), strict=True)]

    return losses


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.8, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_pmpo(alpha: float, beta: float) -> None:
    head = PMPO(alpha=alpha, beta=beta)
    x = groups(head)
    check_objective(head, pmpo(x, alpha, beta), x)
    assert head(x).metrics["pmpo/one_sided"].tolist() == [0, 0, 0, 1, 0]
    kl_T = x.token_kl_T.clone().requires_grad_(True)
    (grad_T,) = torch.autograd.grad(head(change(x, token_kl=kl_T)).loss.sum(), kl_T)
    assert_close(grad_T, x.seg.spread((beta / x.seg.valid_GK.sum(-1, keepdim=True)).double().expand(5, 4)))


def by_group(loss: Callable[[int, list[mpf], list[mpf], list[mpf], list[mpf]], mpf]) -> Made:
    """A loss of group g's log-ratios of desirable, undesirable and unlabelled responses, and of the last' log pi."""

    def make(x: HeadInput) -> Objective:
        def losses(policy: list[mpf]) -> list[mpf]:
            out = []
            for g, (u, logp, kinds) in enumerate(zip(sums(x, policy), sums(x, policy, False), x.label_GK.tolist())):
                sides = [[v for v, s in zip(u, kinds) if s == side] for side in (1, -1, 0)]
                out.append(loss(g, *sides, [v for v, s in zip(logp, kinds) if s == 0]))
            return out

        return losses

    return make


def dpo(better: list[mpf], worse: list[mpf], beta: float) -> mpf:
    if not better or not worse:
        return mpf(0)
    return -log(sigmoid(mpf(beta) * (mean(better) - mean(worse))))


def d2o(alpha: float, beta: float) -> Made:
    def loss(_: int, own: list[mpf], bad: list[mpf], *__: list[mpf]) -> mpf:
        return -log(sigmoid(mpf(beta) * mean(own) - mpf(alpha) * mean(bad))) if own and bad else mpf(0)

    return by_group(loss)


def selm(alpha: float, beta: float) -> Made:
    return by_group(lambda _, w, l, y, __: dpo(w, l, beta) + (mpf(alpha) * mpf(beta) * mean(y) if y else 0))  # noqa: E741


@pytest.mark.parametrize(
    ("head", "made"),
    [
        (D2O(), d2o(0.1, 0.1)),
        (D2O(alpha=0.5, beta=2.0), d2o(0.5, 2.0)),
        (SELM(), selm(0.001, 0.01)),
        (SELM(alpha=0.5, beta=2.0), selm(0.5, 2.0)),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_heads_of_labelled_groups(head: Head, made: Made) -> None:
    x = groups(head)
    check_objective(head, made(x), x)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce"])
@pytest.mark.parametrize(("beta", "lam"), [(0.1, 1e-4), (0.5, 2.0)])
def test_hypo(estimator: str, beta: float, lam: float) -> None:
    """The log-ratios beside log pi are constants: those of the policy as it stands."""
    head = HyPOKL(beta=beta, lam=lam, estimator=estimator)  # type: ignore[arg-type]
    x = groups(head)
    fixed = sums(x, [mpf(p) for p in x.policy_T.tolist()])
    constants = [[v for v, s in zip(u, kinds) if s == 0] for u, kinds in zip(fixed, x.label_GK.tolist())]

    def loss(g: int, better: list[mpf], worse: list[mpf], samples: list[mpf], logp: list[mpf]) -> mpf:
        d = constants[g]
        if not samples:
            return dpo(better, worse, beta)
        others = [(sum(d) - v) / (len(d) - 1) if len(d) > 1 and estimator == "rloo" else mpf(0) for v in d]
        return dpo(better, worse, beta) + mpf(lam) * mean([p * (v - c) for p, v, c in zip(logp, d, others)])

    check_objective(head, by_group(loss)(x), x)


def test_dro_v_vector() -> None:
    x = given([[-10.0, -12.0, -11.0, -15.0]], [[-10.5, -11.5, -11.25, -14.0]], [[4, 6, 5, 7]], [[0] * 4])
    value_T = torch.full((22,), 0.3, dtype=F64).requires_grad_(True)
    x = change(x, reward=grid([[1.0, 0.4, 0.7, -0.5]]), gates={"value": value_T})
    check(DROV(tau=0.5), x, 0.061328, [[-0.056250, -0.043750, -0.034375, 0.037500]])
    (grad_T,) = torch.autograd.grad(DROV(tau=0.5)(x).loss.mean(), value_T)
    assert_close(x.seg.sum(grad_T), grid([[-0.112500, -0.087500, -0.068750, 0.075000]]), rtol=0, atol=6e-7)


def pairs(**fields: Any) -> HeadInput:
    """P as three labelled groups."""
    x = given([*zip(WIN, LOSE)], [*zip(WIN_REF, LOSE_REF)], [[5, 6], [8, 7], [3, 4]], [[1, -1]] * 3)  # type: ignore[list-item]
    return change(x, **fields)


def test_pmpo_vector() -> None:
    x = pairs()
    x = change(x, token_kl=x.seg.spread(0.04 / x.seg.length_GK.double()))
    check(PMPO(), x, -0.23, [[-0.166667, 0.166667]] * 3)


def test_d2o_vector() -> None:
    """The two references of the paper, each where it belongs."""
    x = given([[-9.5, -11.0, -10.0, -14.0]], [[-9.0, -11.5, -10.25, -13.25]], [[2, 3, 1, 4]], [[1, 1, 1, -1]])
    check(D2O(), x, 0.652348, [[-0.015973, -0.015973, -0.015973, 0.047918]])


def test_selm_vector() -> None:
    """The authors' code."""
    logp, ref = [*zip(WIN, LOSE, [-7.0, -8.0, -6.0])], [*zip(WIN_REF, LOSE_REF, [-7.5, -7.75, -6.25])]
    x = given(logp, ref, [[5, 6, 2], [8, 7, 3], [3, 4, 1]], [[1, -1, 0]] * 3)  # type: ignore[arg-type]
    better, worse = [-0.015626, -0.018739, -0.015460], [0.015626, 0.018739, 0.015460]
    check(SELM(beta=0.1, alpha=0.1), x, 0.695604, [*zip(better, worse, [0.003333] * 3)])  # type: ignore[list-item]


def test_selm_vector_of_one_group() -> None:
    """The authors' rule where y' is the chosen text as well: the two gradients add up."""
    x = given([[-12.3, -15.1, -12.3]], [[-13.0, -14.2, -13.0]], [[7, 9, 7]], [[1, -1, 0]])
    loss_G, grad_T = loss_and_grad(SELM(beta=0.01, alpha=0.001), x)
    assert loss_G.item() == pytest.approx(0.685186, abs=6e-7)
    assert (grad_T[0] + grad_T[-1]).item() == pytest.approx(-0.00495, abs=6e-6)


@pytest.mark.parametrize(
    ("estimator", "loss", "grad"), [("reinforce", -0.5, [0.25, -0.125]), ("rloo", 0.375, [0.375, -0.375])]
)
def test_hypo_vectors(estimator: str, loss: float, grad: list[float]) -> None:
    """The KL term alone; its value is not the KL, which the metric has."""
    x = given([[-5.0, -6.0]], [[-5.5, -5.75]], [[2, 3]], [[0, 0]])
    head = HyPOKL(lam=1.0, estimator=estimator)  # type: ignore[arg-type]
    check(head, x, loss, [grad])
    assert head(x).metrics["hypo_kl/kl"].item() == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (D2O(), 0.693147, [-0.05, 0.05, 0.0]),
        (SELM(beta=0.1, alpha=0.1), 0.693147, [-0.05, 0.05, 0.01]),
        (HyPOKL(lam=0.3), 0.693147, [-0.05, 0.05, 0.0]),
        (PMPO(), 0.0, [-0.5, 0.5, 0.0]),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_group_values_at_policy_equals_reference(head: Head, loss: float, grad: list[float]) -> None:
    x = change(
        input_from_logratios([[0.0, 0.0, 0.0]]), label=torch.tensor([[1, -1, 0]]), token_kl=torch.zeros(3, dtype=F64)
    )
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=1e-12)

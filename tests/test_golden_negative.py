"""Negative distillation against its formula: loss, and gradient for log-probs and the student's candidates."""

from __future__ import annotations

import pytest
import torch
from heads_support import F64, change, random_input, segments
from mpmath import exp, log, mp, mpf
from torch.testing import assert_close

from po.heads.neg_distill import NegDistill
from po.heads.sft import SFT
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {NegDistill}


def losses(alpha: float, policy: list[mpf], candidate: list[list[mpf]], teacher: list[list[float]]) -> list[mpf]:
    a, found = mpf(alpha), []
    for p, own, other in zip(policy, candidate, teacher, strict=True):
        away = [exp(mpf(t)) * log(1 - exp(c)) for c, t in zip(own, other, strict=True) if t > -float("inf")]
        found.append(-(1 - a) * p - a * sum(away, mpf(0)))
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_neg_distill_is_its_formula(alpha: float) -> None:
    x = random_input(NegDistill(), seed=3)
    teacher = x.teacher_TM.clone()
    teacher[0, 1:], teacher[2] = -torch.inf, -torch.inf  # fewer tokens stored, and none
    policy, candidate = (t.detach().clone().requires_grad_(True) for t in (x.policy_T, x.candidate_TM))
    out = NegDistill(alpha=alpha)(change(x, policy_T=policy, candidate=candidate, teacher=teacher))
    by_policy, by_candidate = torch.autograd.grad(out.loss.sum(), [policy, candidate])
    with mp.workdps(40):
        p, c, t = [mpf(v) for v in policy.tolist()], [[mpf(v) for v in r] for r in candidate.tolist()], teacher.tolist()
        want = losses(alpha, p, c, t)
        assert_close(out.loss.detach(), torch.tensor([float(v) for v in want], dtype=F64))
        assert_close(by_policy, torch.full_like(by_policy, alpha - 1))
        step = mpf(10) ** -15
        for i in range(len(c)):
            for m in range(len(c[i])):
                up, down = ([*c[i][:m], c[i][m] + d, *c[i][m + 1 :]] for d in (step, -step))
                ends = [losses(alpha, p[i : i + 1], [row], t[i : i + 1])[0] for row in (up, down)]
                assert float(by_candidate[i, m]) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), abs=1e-9)


def test_neg_distill_in_numbers() -> None:
    """By hand: -0.5 ln 0.5 - 0.5 (0.8 ln 0.75 + 0.1 ln 0.5) = 0.346574 + 0.115073 + 0.034657."""
    teacher, candidate = (torch.tensor([v], dtype=F64).log() for v in ([0.8, 0.1], [0.25, 0.5]))
    x = HeadInput(segments([[1]]), torch.tensor([0.5], dtype=F64).log(), teacher=teacher, candidate=candidate)
    out = NegDistill()(x)
    assert out.loss.item() == pytest.approx(0.496304, abs=1e-6)
    assert {k: round(v.item(), 6) for k, v in out.metrics.items()} == {
        "neg_distill/nll": 0.693147,
        "neg_distill/unlikelihood": 0.29946,
        "neg_distill/stored": 0.9,
    }


def test_alpha_zero_is_sft_and_one_candidate_is_unlikelihood() -> None:
    x = random_input(NegDistill(), seed=4)
    assert_close(NegDistill(alpha=0.0)(x).loss, SFT()(x).loss)
    sure = torch.full_like(x.teacher_TM, -torch.inf)
    sure[:, 0] = 0.0  # welleck et al.'s unlikelihood of one token
    assert_close(NegDistill(alpha=1.0)(change(x, teacher=sure)).loss, -torch.log1p(-x.candidate_TM[:, 0].exp()))


def test_the_gradient_on_logits_leaves_what_the_teacher_says() -> None:
    """Also where the student is all but certain of it; past 1 - 1e-6 there is no gradient, and none is infinite."""
    teacher = torch.tensor([[0.7, 0.2, 0.1]]).log()
    for top, least, most in ((0.0, 0.01, 1.0), (9.0, 0.1, 2.0), (60.0, -1e-20, 1e-20)):
        z = torch.tensor([[top, 0.0, 0.0]], requires_grad=True)
        logp_TV = z.log_softmax(-1)
        x = HeadInput(segments([[1]]), logp_TV[:, 2], teacher=teacher, candidate=logp_TV)
        (grad,) = torch.autograd.grad(NegDistill(alpha=1.0)(x).loss.sum(), z)
        assert grad.isfinite().all()
        assert least <= grad[0, 0].item() <= most

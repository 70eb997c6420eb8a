"""Loss and gradient of probability-based SFT against its formulas (mpmath, tests/heads_golden.py), and against figures
that were computed elsewhere."""

from __future__ import annotations

import pytest
import torch
from heads_golden import check_objective
from heads_support import F64, change, loss_and_grad, name_of, random_input, segments
from mpmath import exp, mpf
from torch.testing import assert_close

from po.heads.ampo import AMPO
from po.heads.prob_sft import ProbSFT
from po.heads.prob_sft_threshold import ProbSFTThreshold
from po.types import Head, HeadInput


def best_tokens(x: HeadInput) -> list[int]:
    """Tokens of the best responses: highest reward, else the first."""
    owner, (G, K) = x.seg.slot_T.tolist(), x.seg.valid_GK.shape
    slots = []
    for g in range(G):
        there = [k for k in range(K) if g * K + k in owner]
        slots.append(g * K + (there[0] if x.reward is None else max(there, key=lambda k: float(x.reward_GK[g, k]))))
    return [t for t, s in enumerate(owner) if s in slots]


def power(logp: mpf, alpha: float) -> mpf:
    return (1 - exp(logp) ** mpf(alpha)) / mpf(alpha) if alpha else -logp


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("rewards", [False, True])
def test_prob_sft_is_a_power_of_the_probability(alpha: float, rewards: bool) -> None:
    x = random_input(ProbSFT(), seed=5)
    x = change(x, reward=random_input(AMPO(), ((3, 1, 4, 2), (2, 5), (1,)), seed=6).reward_GK) if rewards else x
    tokens = best_tokens(x)
    check_objective(ProbSFT(alpha=alpha), lambda policy: [power(policy[t], alpha) for t in tokens], x)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keep", ["top", "bottom"])
def test_thresholded_prob_sft_averages_over_the_kept_tokens(alpha: float, keep: str) -> None:
    head = ProbSFTThreshold(alpha=alpha, threshold=0.1, keep=keep)  # type: ignore[arg-type]
    x = random_input(head, seed=5)
    tokens = best_tokens(x)

    def losses(policy: list[mpf]) -> list[mpf]:
        kept = [(exp(policy[t]) >= 0.1) == (keep == "top") for t in tokens]
        share = mpf(len(tokens)) / sum(kept)
        return [share * power(policy[t], alpha) if k else mpf(0) for t, k in zip(tokens, kept, strict=True)]

    assert {v > 0 for v in losses([mpf(p) for p in x.policy_T.tolist()])} == {True, False}
    check_objective(head, losses, x)


COVERED: set[type[Head]] = {ProbSFT, ProbSFTThreshold}


# Figures of an independent float64 script, to 6 decimals.
LOGPS = [-0.05, -0.4, -1.5, -3.0, -6.0]  # of one row's five tokens


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (ProbSFT(alpha=0.0), 2.19, [-0.2, -0.2, -0.2, -0.2, -0.2]),
        (ProbSFT(alpha=1.0), 0.620611, [-0.190246, -0.134064, -0.044626, -0.009957, -0.000496]),
        (ProbSFT(alpha=0.5), 0.98427, [-0.195062, -0.163746, -0.094473, -0.044626, -0.009957]),
        (ProbSFT(alpha=2.0), 0.359356, [-0.180967, -0.089866, -0.009957, -0.000496, -0.000001]),
        (ProbSFT(alpha=10.0), 0.087503, [-0.121306, -0.003663, 0, 0, 0]),
        (ProbSFTThreshold(threshold=0.2), 0.385107, [-0.317076, -0.22344, -0.074377, 0, 0]),
        (ProbSFTThreshold(threshold=0.2, keep="bottom"), 0.973867, [0, 0, 0, -0.024894, -0.001239]),
        (ProbSFTThreshold(threshold=0.2, alpha=0.0), 0.65, [-0.333333, -0.333333, -0.333333, 0, 0]),
        (ProbSFTThreshold(threshold=0.2, alpha=0.0, keep="bottom"), 4.5, [0, 0, 0, -0.5, -0.5]),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_prob_sft_vectors(head: Head, loss: float, grad: list[float]) -> None:
    x = HeadInput(segments([[5]]), torch.tensor(LOGPS, dtype=F64).requires_grad_(True))
    loss_T, grad_T = loss_and_grad(head, x)
    assert loss_T.mean().item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


def test_prob_sft_s_gradient_on_logits() -> None:
    """p^a (softmax - one-hot), for the target 0 and logits 2, 0.5, -1."""
    for alpha, loss, grad in (
        (0.0, 0.241311, [-0.214403, 0.17529, 0.039113]),
        (1.0, 0.214403, [-0.168434, 0.137708, 0.030727]),
        (10.0, 0.091046, [-0.019197, 0.015695, 0.003502]),
    ):
        logits_V = torch.tensor([2.0, 0.5, -1.0], dtype=F64, requires_grad=True)
        out = ProbSFT(alpha=alpha)(HeadInput(segments([[1]]), logits_V.log_softmax(-1)[:1])).loss
        assert out.item() == pytest.approx(loss, abs=6e-7)
        assert_close(torch.autograd.grad(out, logits_V)[0], torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)

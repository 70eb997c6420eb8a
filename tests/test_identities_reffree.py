"""What the heads without a reference say of DPO under a uniform one, and of one another."""

from __future__ import annotations

import pytest
import torch
from heads_support import F64, change, grid, loss_and_grad, name_of, random_input
from torch import Tensor
from torch.testing import assert_close

from po.heads.alphapo import AlphaPO
from po.heads.cpo import CPO
from po.heads.dpo import DPO
from po.heads.hinge import Hinge
from po.heads.orpo import ORPO
from po.heads.sft import SFT
from po.heads.simpo import SimPO
from po.heads.slic import SLiC
from po.heads.tpo_l import TPOL
from po.heads.tpo_triple import TPOTriple
from po.types import Head, HeadInput, Segments

PAIRS = ((3, 5), (1, 2), (4, 1), (2, 2))
SETS = ((3, 1, 4, 2, 2), (2, 5), (1, 1, 1))


def pairs() -> HeadInput:
    """Pairs with rewards that agree: for heads of pairs and of sets alike."""
    x = random_input(CPO(), PAIRS, seed=1)
    return change(x, reward=torch.tensor([[1.0, 0.0]] * 4, dtype=F64))


def uniform(x: HeadInput) -> HeadInput:
    """A reference that gives every token the same log-prob of 0."""
    return change(x, ref=torch.zeros_like(x.policy_T))


def same(a: Head, b: Head, x: HeadInput, y: HeadInput | None = None) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, x if y is None else y), rtol=1e-10, atol=1e-13)


def test_cpo_without_likelihood_is_dpo_under_a_uniform_reference() -> None:
    same(CPO(beta=0.3, alpha=0), DPO(beta=0.3), pairs(), uniform(pairs()))


def test_slic_without_likelihood_is_the_hinge_under_a_uniform_reference() -> None:
    same(SLiC(delta=1, lam=0), Hinge(beta=1), pairs(), uniform(pairs()))


def test_alphapo_at_alpha_0_is_simpo() -> None:
    same(AlphaPO(beta=2, gamma=0.5, alpha=0), SimPO(beta=2, gamma=0.5), pairs())
    near = loss_and_grad(AlphaPO(beta=2, gamma=0.5, alpha=1e-7), pairs())
    assert_close(near, loss_and_grad(SimPO(beta=2, gamma=0.5), pairs()), rtol=1e-5, atol=1e-6)


def test_alphapo_at_alpha_minus_1_rewards_probability() -> None:
    """(1 - p) / -1 = p - 1: the geometric mean probability itself."""
    x = pairs()
    p_GK = x.seg.mean(x.policy_T).exp()
    expected_G = -torch.nn.functional.logsigmoid(3 * (p_GK[:, 0] - p_GK[:, 1]) - 0.5)
    assert_close(loss_and_grad(AlphaPO(beta=3, gamma=0.5, alpha=-1), x)[0], expected_G.detach())


def test_tpo_of_two_responses_is_cpo_and_tpo_l_is_simpo() -> None:
    same(TPOTriple(beta=0.3, alpha=0.7), CPO(beta=0.3, alpha=0.7), pairs())
    same(TPOL(beta=3, gamma=0.4, alpha=0), SimPO(beta=3, gamma=0.4), pairs())


def test_orpo_without_odds_is_fine_tuning() -> None:
    """Where all better responses are of one length, which is where the averages over tokens and over pairs agree."""
    x = change(random_input(CPO(), ((3, 5), (3, 2)), seed=1), best_first=True)
    (nll_G, grad_T), (_, sft_T) = loss_and_grad(ORPO(lam=0), x), loss_and_grad(SFT(), x)
    assert_close(nll_G, -x.seg.mean(x.policy_T)[:, 0].detach())
    assert_close(grad_T, sft_T)


def test_orpo_of_unlikely_responses_is_simpo_without_margin() -> None:
    """Odds are probabilities where these are small."""
    x = pairs()
    x = change(x, policy_T=(x.policy_T.detach() - 40).requires_grad_(True))
    contrast_G = (loss_and_grad(ORPO(lam=1), x)[0] - loss_and_grad(ORPO(lam=0), x)[0]).detach()
    assert_close(contrast_G, loss_and_grad(SimPO(beta=1, gamma=0), x)[0])


def test_simpo_of_small_beta_pulls_by_mean_log_probs() -> None:
    """(2 / beta) times its gradient without a margin tends to that of m(y_l) - m(y_w), whatever the policy."""
    x = pairs()
    _, grad_T = loss_and_grad(SimPO(beta=1e-7, gamma=0), x)
    sign_GK = torch.tensor([[-1.0, 1.0]] * 4, dtype=F64) / x.seg.length_GK / 4
    assert_close(grad_T * 2e7, x.seg.spread(sign_GK), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("head", [SimPO(), AlphaPO(), ORPO(), TPOL()], ids=name_of)
def test_means_do_not_know_lengths(head: Head) -> None:
    """Every token twice: sums double, means stay. CPO and SLiC, which sum, change."""
    x = pairs()
    y = change(x, seg=doubled(x), policy_T=x.policy_T.detach().repeat_interleave(2))
    assert_close(loss_and_grad(head, y)[0], loss_and_grad(head, x)[0])
    for sums in (CPO(), SLiC(), TPOTriple(beta=0.3)):
        assert ((loss_and_grad(sums, y)[0] - loss_and_grad(sums, x)[0]).abs() > 1e-3).any()


def doubled(x: HeadInput) -> Segments:
    return Segments(x.seg.slot_T.repeat_interleave(2), x.seg.valid_GK)


@pytest.mark.parametrize("head", [SimPO(), AlphaPO(alpha=0), TPOL(alpha=0)], ids=name_of)
def test_contrasts_of_means_pull_and_push_alike(head: Head) -> None:
    x = pairs()
    _, grad_T = loss_and_grad(head, x)
    pull_G, push_G = x.seg.sum(grad_T).unbind(-1)
    assert (pull_G < 0).all()
    assert_close(pull_G, -push_G)


@pytest.mark.parametrize("head", [CPO, TPOTriple])
def test_contrasts_of_sums_pull_and_push_each_token_alike(head: type[Head]) -> None:
    """And the likelihood adds alpha / (pairs * tokens) to each token of the better response."""
    x = pairs()
    _, grad_T = loss_and_grad(head(alpha=0), x)  # type: ignore[call-arg]
    pull_G, push_G = x.seg.mean(grad_T).unbind(-1)
    assert_close(pull_G, -push_G)
    _, more_T = loss_and_grad(head(alpha=0.3), x)  # type: ignore[call-arg]
    added_GK = torch.tensor([[-0.3 / 4, 0.0]] * 4, dtype=F64) / x.seg.length_GK
    assert_close(more_T - grad_T, x.seg.spread(added_GK))


def sets(reward: list[list[float]]) -> tuple[HeadInput, Tensor]:
    """Sets with these rewards, and which response each token belongs to."""
    x = change(random_input(TPOTriple(), SETS, seed=2), reward=grid(reward))
    return x, x.seg.slot_T


@pytest.mark.parametrize("head", [TPOTriple(beta=0.3), TPOL()], ids=name_of)
def test_only_gold_second_and_last_learn(head: Head) -> None:
    x, slot_T = sets([[1.0, 9.0, 5.0, -2.0, 3.0], [1.0, 4.0], [2.0, 1.0, 3.0]])
    _, grad_T = loss_and_grad(head, x)
    moved = set(slot_T[grad_T != 0].tolist())
    assert moved == {1, 2, 3} | {5, 6} | {10, 11, 12}
    assert (grad_T[slot_T == 3] > 0).all(), "the worst"
    assert (grad_T[slot_T == 11] > 0).all(), "the worst"
    assert (grad_T[slot_T == 2] < 0).all(), "the second"


@pytest.mark.parametrize("head", [TPOTriple(beta=0.3), TPOL()], ids=name_of)
def test_ties_go_by_place(head: Head) -> None:
    """All equal: the first is gold, the next chosen, the last rejected."""
    tied, slot_T = sets([[2.0] * 5, [2.0] * 2, [2.0] * 3])
    ranked, _ = sets([[5.0, 4.0, 3.0, 2.0, 1.0], [2.0, 1.0], [3.0, 2.0, 1.0]])
    assert_close(loss_and_grad(head, tied), loss_and_grad(head, ranked))
    assert set(slot_T[loss_and_grad(head, tied)[1] != 0].tolist()) == {0, 1, 4, 5, 6, 10, 11, 12}


@pytest.mark.parametrize("head", [TPOTriple(beta=0.3), TPOL()], ids=name_of)
def test_only_the_order_of_rewards_counts(head: Head) -> None:
    x, _ = sets([[1.0, 9.0, 5.0, -2.0, 3.0], [1.0, 4.0], [2.0, 1.0, 3.0]])
    assert_close(loss_and_grad(head, change(x, reward=(x.reward_GK / 3).exp() - 100)), loss_and_grad(head, x))

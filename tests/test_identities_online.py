"""What the policy-gradient heads beyond the GRPO family say of other heads, and what they promise."""

from __future__ import annotations

import pytest
import torch
from heads_support import F64, Lengths, change, grid, loss_and_grad, name_of, parts, random_input, segments
from torch import Tensor
from torch.testing import assert_close

from po.heads.bcpg_nsa import BCPGNSA
from po.heads.capo import CAPO
from po.heads.gcpo_gold import GCPOGold
from po.heads.grpo import GRPO
from po.heads.gspo import GSPO
from po.heads.nft import NFT
from po.heads.ppo import PPO
from po.heads.reinforce_pp import ReinforcePP
from po.heads.rloo import RLOO
from po.heads.rloo_ref_free import RLOORefFree
from po.heads.sapo import SAPO
from po.heads.vespo import VESPO
from po.numeric import group_advantages, later_sums, whiten
from po.types import Head, HeadInput

LENGTHS: Lengths = ((2, 1, 3, 1), (1, 3), (2, 1, 1), (2,))
RESPONSES = 10
TOKENS = 17


def given(head: Head, on_policy: bool = False) -> HeadInput:
    """Reference and sampler differ; no correction."""
    x = random_input(head, LENGTHS, seed=3, same=on_policy)
    if x.correction is not None:
        x = change(x, correction=torch.ones_like(x.policy_T))
    if x.ref is not None and x.old is not None:
        x = change(x, ref=x.old_T + torch.linspace(-0.9, 1.3, TOKENS, dtype=F64).sin())
    return x


def same(a: Head, b: Head, x: HeadInput) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, x), rtol=1e-11, atol=1e-13)


def gradient(head: Head, x: HeadInput) -> Tensor:
    return loss_and_grad(head, x)[1]


def per_token(x: HeadInput, A_GK: Tensor) -> Tensor:
    """-A spread over the tokens of each response, the mean of which counts, over the responses."""
    return -x.seg.spread(A_GK / x.seg.length_GK.clamp(min=1)) / RESPONSES


# Sums to come


def plain_sums(x_T: list[float], slot_T: list[int], decay: float) -> list[float]:
    out, ahead = [0.0] * len(x_T), 0.0
    for t in reversed(range(len(x_T))):
        goes_on = t + 1 < len(x_T) and slot_T[t + 1] == slot_T[t]
        ahead = x_T[t] + (decay * ahead if goes_on else 0.0)
        out[t] = ahead
    return out


@pytest.mark.parametrize("decay", [1.0, 0.95, 0.5, 1e-3, 0.0])
@pytest.mark.parametrize("lengths", [[[1]], [[1, 1, 1]], [[3, 1], [7]], [[3000, 1, 517], [64, 128]]], ids=str)
def test_sums_to_come_are_the_plain_loop(lengths: Lengths, decay: float) -> None:
    """Also over thousands of tokens, where powers of the decay are far below what floats hold."""
    seg = segments(lengths)
    x_T = torch.randn(seg.slot_T.numel(), generator=torch.Generator().manual_seed(0), dtype=F64)
    found_T = later_sums(x_T, seg.slot_T, decay)
    assert found_T.tolist() == pytest.approx(plain_sums(x_T.tolist(), seg.slot_T.tolist(), decay), abs=1e-10)
    assert_close(later_sums(x_T.float(), seg.slot_T, decay).double(), found_T, rtol=1e-4, atol=1e-4)


def test_whitening_takes_no_part_from_what_is_masked_or_equal() -> None:
    where = torch.tensor([True, True, True, False])
    found = whiten(torch.tensor([1.0, 2.0, 3.0, torch.nan]), where)
    assert_close(found, torch.tensor([-1.5, 0.0, 1.5, 0.0]).div(1.5).mul(1.5**0.5))
    assert_close(whiten(torch.full((4,), 7.3), where), torch.zeros(4))
    assert whiten(torch.tensor([0.0, 1e-9, 0.0, 0.0]), where).abs().max() < 1e-4, "noise is not blown up"


# At policy == sampler


def test_sapo_on_policy_has_grpo_s_gradient_and_another_value() -> None:
    x = given(SAPO(), on_policy=True)
    head = SAPO(tau_pos=2.0, tau_neg=0.7)
    assert_close(gradient(head, x), gradient(GRPO(), x))
    A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, "unbiased")
    assert_close(head(x).loss, torch.where(A_GK > 0, -2 * A_GK / 2.0, -2 * A_GK / 0.7))
    assert not torch.allclose(gradient(head, given(head)), gradient(GRPO(), given(head)))


def test_vespo_on_policy_is_reinforce() -> None:
    x = given(VESPO(), on_policy=True)
    assert_close(VESPO()(x).metrics["vespo/phi"], torch.ones_like(x.reward_GK))
    A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, "unbiased")
    assert_close(gradient(VESPO(), x), -x.seg.spread(A_GK) / TOKENS)


@pytest.mark.parametrize("shift", [-15.0, 15.0])
def test_vespo_lets_go_of_what_has_drifted(shift: float) -> None:
    x = given(VESPO())
    x = change(x, old=x.policy_T.detach() - shift)
    assert gradient(VESPO(), x).abs().max() < 1e-8


def test_rloo_on_policy_is_reinforce_with_the_others_as_baseline() -> None:
    x = given(RLOORefFree(), on_policy=True)
    r_GK = torch.where(x.seg.valid_GK, x.reward_GK, 0)
    n_G1 = x.seg.valid_GK.sum(-1, keepdim=True)
    others_GK = torch.where(n_G1 > 1, (r_GK.sum(-1, keepdim=True) - r_GK) / (n_G1 - 1).clamp(min=1), 0)
    assert_close(gradient(RLOORefFree(), x), -x.seg.spread(r_GK - others_GK) / RESPONSES)


def test_rloo_is_rloo_ref_free_on_rewards_less_the_kl() -> None:
    x = given(RLOO())
    same(RLOO(beta=0.0), RLOORefFree(), x)
    kl_GK = x.seg.sum(x.old_T - x.ref_T)
    assert_close(
        loss_and_grad(RLOO(beta=0.7), x), loss_and_grad(RLOORefFree(), change(x, reward=x.reward_GK - 0.7 * kl_GK))
    )
    assert not torch.allclose(RLOO(beta=0.7)(x).loss, RLOORefFree()(x).loss)


@pytest.mark.parametrize("omega", ["linear", "sqrt"])
def test_nft_on_policy_has_group_advantages(omega: str) -> None:
    """linear: rewards less their mean; sqrt: over the population's deviation too."""
    x = change(given(NFT(), on_policy=True), reward=(given(NFT()).reward_GK > 0).double())
    scale = {"linear": "none", "sqrt": "population"}[omega]
    A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, scale)
    assert A_GK.abs().sum() > 1
    assert_close(gradient(NFT(omega=omega), x), -x.seg.spread(A_GK) / TOKENS)


def test_reinforce_pp_on_policy_is_whitened_reinforce() -> None:
    x = given(ReinforcePP(), on_policy=True)
    returns_T = ReinforcePP(beta=0.3)(x).metrics["reinforce_pp/return"]
    white_T = (returns_T - returns_T.mean()) / returns_T.std(correction=0)
    assert_close(gradient(ReinforcePP(beta=0.3), x), -white_T / TOKENS)


# NFT


def test_nft_reads_rewards_by_their_sign() -> None:
    x = given(NFT())
    sign_GK = torch.where(x.reward_GK > 0, 1.0, -1.0)
    for reward_GK in (sign_GK, (sign_GK > 0).double(), 1e6 * sign_GK):
        assert_close(loss_and_grad(NFT(), change(x, reward=reward_GK)), loss_and_grad(NFT(), x))


def test_nft_without_negatives_is_weighted_sft() -> None:
    x = change(given(NFT()), seg=segments([[2, 1, 3, 1, 1, 3, 2, 4]]), reward=grid([[1, 0, 1, 0, 0, 0, 1, 0]]))
    _, grad_T = loss_and_grad(NFT(neg_weight=0.0), x)
    right_T = x.seg.spread(x.reward_GK)
    assert_close(grad_T, -(1 - 3 / 8) * right_T / TOKENS)


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_nft_says_nothing_of_groups_that_agree(reward: float) -> None:
    x = given(NFT())
    loss_T, grad_T = loss_and_grad(NFT(), change(x, reward=torch.full_like(x.reward_GK, reward)))
    assert_close((loss_T, grad_T), (torch.zeros_like(loss_T), torch.zeros_like(grad_T)))


def test_nft_policies_mix_to_the_sampler() -> None:
    """pi q + pi- (1 - q) = mu: the loss of a wrong token is -log of the pi-/mu that this leaves, within the bound."""
    x = change(given(NFT()), seg=segments([[TOKENS - 1, 1]]), reward=grid([[0.0, 1.0]]))
    x = change(x, old=x.policy_T.detach() + torch.linspace(0.1, 2.0, TOKENS, dtype=F64))
    head = NFT(omega="none", epsilon=1e-6)
    mixed_T = 0.5 * (-head(x).loss).exp() + 0.5 * (x.policy_T - x.old_T).exp()
    assert_close(mixed_T[:-1], torch.ones(TOKENS - 1, dtype=F64))


# CAPO, GCPO, BCPG-NSA


def at(x: HeadInput, share: float) -> HeadInput:
    return change(x, progress=torch.tensor(share, dtype=F64))


def test_capo_after_its_first_phase_is_grpo() -> None:
    x = given(CAPO())
    same(CAPO(phase=0.25), GRPO(), at(x, 0.25))
    same(CAPO(phase=0.0), GRPO(), at(x, 0.0))


def test_capo_at_first_leaves_out_what_is_worse() -> None:
    """Exactly no gradient there, and what is left weighs as much as in GRPO."""
    x = at(given(CAPO()), 0.24)
    worse_GK = x.seg.valid_GK & (group_advantages(x.reward_GK, x.seg.valid_GK, "none") < 0)
    assert worse_GK.any()
    (first, first_grad), (whole, whole_grad) = loss_and_grad(CAPO(phase=0.25), x), loss_and_grad(GRPO(), x)
    assert_close(first, whole.masked_fill(worse_GK, 0))
    assert_close(first_grad, whole_grad.masked_fill(x.seg.spread(worse_GK), 0))
    assert_close(CAPO(phase=0.25)(x).metrics["capo/kept"], (~worse_GK).double())


def with_gold(x: HeadInput, gold_GK: Tensor) -> HeadInput:
    return change(x, response_columns={"gold": gold_GK})


def test_gcpo_without_gold_is_gspo() -> None:
    x = with_gold(given(GCPOGold()), torch.zeros(4, 4, dtype=F64))
    same(GCPOGold(), GSPO(epsilon_low=0.2, epsilon_high=0.2, scale="population"), x)


def test_gold_has_the_gradient_of_sft_and_its_mu_is_not_read() -> None:
    """In a group that was all wrong: sqrt(n - 1) times that of the mean log-likelihood."""
    x = change(given(GCPOGold()), seg=segments([[4, 4, 6, 3]]), reward=grid([[0.0, 0.0, 1.0, 0.0]]))
    x = with_gold(x, grid([[0.0, 0.0, 1.0, 0.0]]))
    gold_T = x.seg.slot_T == 2
    _, grad_T = loss_and_grad(GCPOGold(), x)
    assert_close(grad_T[gold_T], torch.full((6,), -(3**0.5) / 6 / 4, dtype=F64))
    unread = change(x, old=torch.where(gold_T, torch.nan, x.old_T))
    assert_close(loss_and_grad(GCPOGold(), unread), loss_and_grad(GCPOGold(), x))
    assert GCPOGold()(x).metrics["gcpo_gold/ratio"][0, 2] == 1


def test_bcpg_nsa_minds_right_steps_of_wrong_answers_alone() -> None:
    x = given(BCPGNSA())
    none = change(x, token_columns={"correct_step": torch.zeros(TOKENS, dtype=F64)})
    every = change(x, token_columns={"correct_step": torch.ones(TOKENS, dtype=F64)})
    same(BCPGNSA(), BCPGNSA(lam=1.0), none)
    assert_close(loss_and_grad(BCPGNSA(lam=1.0), every), loss_and_grad(BCPGNSA(), none))
    wrong_T = x.seg.spread(group_advantages(x.reward_GK, x.seg.valid_GK, "none") < 0)
    grad_T, plain_T = gradient(BCPGNSA(), every), gradient(BCPGNSA(), none)
    assert_close(grad_T[~wrong_T], plain_T[~wrong_T])
    assert (plain_T[wrong_T] > 0).any()
    assert (grad_T[wrong_T] <= 0).all(), "no token of a right step is pushed down"


def test_bcpg_nsa_at_policy_equals_reference_is_reinforce() -> None:
    x = given(BCPGNSA(), on_policy=True)
    x = change(x, token_columns={"correct_step": torch.zeros(TOKENS, dtype=F64)})
    A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, "none")
    assert_close(gradient(BCPGNSA(), x), per_token(x, A_GK))


# REINFORCE++ and PPO


def test_reinforce_pp_does_not_see_scale_and_level_of_rewards() -> None:
    x = given(ReinforcePP())
    same_T = loss_and_grad(ReinforcePP(beta=0.0), x)
    assert_close(loss_and_grad(ReinforcePP(beta=0.0), change(x, reward=5 * x.reward_GK + 3)), same_T)


def test_the_group_baseline_does_not_see_the_level_of_a_prompt() -> None:
    x = given(ReinforcePP())
    y = change(x, reward=x.reward_GK + torch.tensor([[1.0], [-4.0], [0.0], [9.0]], dtype=F64))
    head = ReinforcePP(baseline="group")
    assert_close(loss_and_grad(head, y), loss_and_grad(head, x))
    assert not torch.allclose(ReinforcePP()(y).loss, ReinforcePP()(x).loss)


def test_reinforce_pp_of_equal_returns_says_nothing() -> None:
    x = given(ReinforcePP())
    x = change(x, reward=torch.full_like(x.reward_GK, 0.7), ref=x.old_T)
    assert_close(gradient(ReinforcePP(), x), torch.zeros(TOKENS, dtype=F64))


def with_values(x: HeadInput, value_T: Tensor) -> HeadInput:
    return change(x, gates={"value": value_T}, old_gates={"value": value_T})


def test_ppo_without_values_is_reinforce_pp() -> None:
    x = with_values(given(PPO()), torch.zeros(TOKENS, dtype=F64))
    same(PPO(beta=0.3, lam=1.0, vf_coef=0.0), ReinforcePP(beta=0.3, variance="unbiased"), x)


def test_ppo_s_lam_goes_from_one_step_to_the_whole_return() -> None:
    x = with_values(given(PPO()), torch.linspace(-1, 2, TOKENS, dtype=F64))
    value_T, slot_T = x.old_gate_T("value"), x.seg.slot_T.tolist()
    last_T = torch.tensor([t + 1 == TOKENS or slot_T[t + 1] != slot_T[t] for t in range(TOKENS)])
    reward_T = torch.where(last_T, x.seg.spread(x.reward_GK), 0) - 0.3 * (x.old_T - x.ref_T)
    whole_T = torch.tensor(plain_sums(reward_T.tolist(), slot_T, 0.9), dtype=F64)
    assert_close(PPO(beta=0.3, lam=1.0, gamma=0.9)(x).metrics["ppo/return"], whole_T)
    next_T = torch.where(last_T, 0, torch.cat([value_T[1:], value_T[:1]]))
    assert_close(PPO(beta=0.3, lam=0.0, gamma=0.9)(x).metrics["ppo/return"], reward_T + 0.9 * next_T)


def test_ppo_with_the_right_values_has_nothing_to_learn() -> None:
    """Returns without chance, and values that are them: no advantage, no loss."""
    x = given(PPO())
    x = with_values(x, PPO(beta=0.3, lam=1.0)(x).metrics["ppo/return"])
    loss_T, grad_T = loss_and_grad(PPO(beta=0.3, lam=0.4, whiten=False), x)
    assert_close((loss_T, grad_T), (torch.zeros_like(loss_T), torch.zeros_like(grad_T)), rtol=0, atol=1e-12)


def test_dual_clip_far_away_does_nothing() -> None:
    x = given(PPO())
    same(PPO(dual_clip=True, c=1e9), PPO(), x)
    far = change(x, old=x.old_T - 3)
    assert (PPO(dual_clip=True)(far).loss <= PPO()(far).loss).all()
    assert (PPO(dual_clip=True)(far).loss < PPO()(far).loss).any()


def test_ppo_s_value_starts_at_zero_and_does_not_train_the_policy() -> None:
    hidden_TLD = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    module = PPO().build(8, 3)
    value_T = module(hidden_TLD)["value"]
    assert value_T.tolist() == [0.0] * 5
    value_T.square().sum().backward()
    (module(hidden_TLD)["value"] - 1).square().sum().backward()
    assert hidden_TLD.grad is None
    assert module.linear.weight.grad.abs().sum() > 0


# What all of them share

RATIO = [SAPO(), VESPO(), RLOO(), RLOORefFree(), ReinforcePP(), PPO(vf_coef=0.0), NFT(), CAPO(), GCPOGold()]


@pytest.mark.parametrize("head", RATIO, ids=name_of)
def test_corrections_multiply(head: Head) -> None:
    """Each response's own weight multiplies its loss, as the mean of its tokens' weights or token by token."""
    x = given(head)
    weight_GK = torch.linspace(0.1, 2.0, x.seg.valid_GK.numel(), dtype=F64).view(x.seg.valid_GK.shape)
    weight_T = x.seg.spread(weight_GK)
    loss, grad_T = loss_and_grad(head, x)
    weight = weight_T if head.needs.unit == "token" else weight_GK
    assert_close(loss_and_grad(head, change(x, correction=weight_T)), (loss * weight, grad_T * weight_T))


def test_ppo_s_value_takes_no_correction() -> None:
    x = given(PPO())
    head = PPO(vf_coef=0.7)
    value_T = 0.7 * head(x).metrics["ppo/value_loss"]
    assert_close(head(change(x, correction=torch.zeros(TOKENS, dtype=F64))).loss, value_T)


@pytest.mark.parametrize("head", [SAPO(), VESPO(), RLOORefFree(), CAPO(), GCPOGold()], ids=name_of)
def test_equal_rewards_say_nothing_and_their_level_does_not_matter(head: Head) -> None:
    """In groups of at least two."""
    x = change(given(head), seg=segments([[4, 5, 2], [1, 3, 2]]))
    x = change(
        x, reward=grid([[0.3, 0.3, 0.3], [1.0, 0.2, 0.4]]), response_columns={"gold": torch.zeros(2, 3, dtype=F64)}
    )
    loss, grad_T = loss_and_grad(head, x)
    first_T = x.seg.slot_T < 3
    assert grad_T[first_T].abs().max() == 0
    assert grad_T[~first_T].abs().max() > 0
    y = change(x, reward=x.reward_GK + grid([[5.0] * 3, [-2.0] * 3]))
    assert_close(loss_and_grad(head, y), (loss, grad_T))


@pytest.mark.parametrize("head", [ReinforcePP(), ReinforcePP(baseline="group"), PPO()], ids=name_of)
def test_whitening_is_over_the_whole_step(head: Head) -> None:
    """A further group changes the loss of the others, which is why the step is taken together."""
    x = given(head)
    y = change(x, reward=x.reward_GK + torch.tensor([[0.0], [0.0], [0.0], [9.0]], dtype=F64))
    y = (
        y
        if getattr(head, "baseline", "") != "group"
        else change(x, reward=x.reward_GK * grid([[1.0], [7.0], [1.0], [1.0]]))
    )
    assert head.needs.couples_batch
    assert not torch.allclose(parts(head, x).outputs[0].loss[:7], parts(head, y).outputs[0].loss[:7])

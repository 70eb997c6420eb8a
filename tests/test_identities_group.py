"""What the heads of the GRPO family say of one another, and what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from heads_contract import only
from heads_support import F64, change, grid, loss_and_grad, name_of, random_input
from torch.testing import assert_close

from po.heads.cispo import CISPO
from po.heads.dapo import DAPO
from po.heads.dr_grpo import DrGRPO
from po.heads.grpo import GRPO
from po.heads.grpo2 import GRPO2
from po.heads.grpo_kl import GRPOKL
from po.heads.gspo import GSPO
from po.heads.luspo import LUSPO
from po.numeric import group_advantages
from po.objective import counted, objective, scope
from po.spec import Term
from po.types import Head, HeadInput

LENGTHS = ((2, 1, 3, 1), (1, 3), (2, 3, 1), (2, 2))
PAIRS = ((2, 1), (1, 3), (4, 2), (2, 2))
CLIPPED: list[Head] = [GRPO(), DAPO(), DrGRPO(), GSPO(), LUSPO(), CISPO()]
ALL: list[Head] = [*CLIPPED, GRPO2(), GRPOKL()]


def with_correction(x: HeadInput, value: float = 1.0) -> HeadInput:
    return change(x, correction=torch.full_like(x.policy_T, value).detach())


def on_policy(head: Head, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> HeadInput:
    return with_correction(random_input(head, lengths, seed=5, same=True))


# Advantages


def test_two_samples_disagree_by_one_whatever_the_gap() -> None:
    for gap in (1e-6, 0.3, 1e6):
        R_GK = torch.tensor([[0.1 + gap, 0.1], [0.1, 0.1 + gap]], dtype=F64)
        where = torch.ones(2, 2, dtype=torch.bool)
        sign_GK = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
        assert_close(group_advantages(R_GK, where, "population"), sign_GK)
        assert_close(group_advantages(R_GK, where, "unbiased"), sign_GK / math.sqrt(2))


def test_grpo2_is_grpo_with_the_population_deviation() -> None:
    x = random_input(GRPO2(), PAIRS, seed=5)
    assert_close(loss_and_grad(GRPO2(), x), loss_and_grad(GRPO(scale="population", epsilon_high=0.28), x))


@pytest.mark.parametrize("right", [1, 3, 5])
def test_binary_rewards(right: int) -> None:
    """A = sqrt((1 - p) / p) and -sqrt(p / (1 - p)) for a share p of right responses."""
    head, p = GRPO(scale="population"), right / 8
    x = with_correction(random_input(head, [[1] * 8], same=True, reward=grid([[1.0] * right + [0.0] * (8 - right)])))
    A = [math.sqrt((1 - p) / p)] * right + [-math.sqrt(p / (1 - p))] * (8 - right)
    assert_close(-head(x).loss, torch.tensor([A], dtype=F64))


# At policy == sampler


def test_on_policy_all_are_reinforce() -> None:
    """The tokens' mean of -A log pi for dapo and cispo; each response's mean for grpo and gspo, its sum for luspo; and
    without the scale the sum over L for dr_grpo."""
    x = on_policy(GRPO())
    for scale in ("unbiased", "population", "none"):
        A_GK = group_advantages(x.reward_GK, x.seg.valid_GK, scale)
        each_T = -x.seg.spread(A_GK) * x.policy_T
        n = int(x.seg.valid_GK.sum())
        (token_T,) = torch.autograd.grad(each_T.mean(), x.policy_T, retain_graph=True)
        (mean_T,) = torch.autograd.grad(x.seg.mean(each_T).sum() / n, x.policy_T, retain_graph=True)
        (sum_T,) = torch.autograd.grad(x.seg.sum(each_T).sum() / n, x.policy_T)
        for head, expected_T in (
            (DAPO(scale=scale), token_T),
            (CISPO(scale=scale), token_T),
            (GRPO(scale=scale), mean_T),
            (GSPO(scale=scale), mean_T),
            (LUSPO(scale=scale), sum_T),
        ):
            assert_close(loss_and_grad(head, x)[1], expected_T)
    assert_close(loss_and_grad(DrGRPO(max_completion_length=7), x)[1], sum_T / 7)


def test_on_policy_grpo2_is_the_difference_of_mean_scores() -> None:
    """-1/2 (mean of the better's tokens - mean of the worse's), averaged over pairs; none where they agree."""
    x = on_policy(GRPO2(), PAIRS)
    x = change(x, reward=torch.tensor([[1.0, 0.0], [0.2, 0.7], [3.0, 3.0], [5.0, -5.0]], dtype=F64))
    sign_GK = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]], dtype=F64)
    loss_GK, grad_T = loss_and_grad(GRPO2(), x)
    assert_close(loss_GK, -sign_GK)
    assert_close(grad_T, -x.seg.spread(sign_GK / x.seg.length_GK) / 2 / len(PAIRS))


# Among one another


def test_with_responses_of_one_token_the_unit_does_not_matter() -> None:
    x = random_input(GRPO(), [[1] * 4, [1] * 3], seed=5)
    narrow = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    loss_GK, grad_T = loss_and_grad(GRPO(**narrow), x)
    for head in (GSPO(**narrow), LUSPO(**narrow)):
        assert_close(loss_and_grad(head, x), (loss_GK, grad_T))
    loss_T, token_T = loss_and_grad(DAPO(**narrow), x)
    assert_close((loss_T, token_T), (loss_GK[x.seg.valid_GK], grad_T))
    assert_close(loss_and_grad(DrGRPO(max_completion_length=1), x), loss_and_grad(GRPO(scale="none"), x))


def test_luspo_is_gspo_times_the_length() -> None:
    x = with_correction(random_input(GSPO(), LENGTHS, seed=5))
    narrow = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    assert_close(LUSPO(**narrow)(x).loss, x.seg.length_GK * GSPO(**narrow)(x).loss)


def test_cispo_without_a_clip_is_the_importance_weighted_policy_gradient() -> None:
    x = random_input(CISPO(), LENGTHS, seed=5)
    _, cispo_T = loss_and_grad(CISPO(epsilon_high=1e9), x)
    _, ratio_T = loss_and_grad(DAPO(epsilon_low=1.0, epsilon_high=1e9), x)
    assert_close(cispo_T, ratio_T)


def test_delta_is_dual_clip() -> None:
    """PPO's dual clip by its own formula: where A < 0 the loss is at most -c A."""
    x = random_input(DAPO(), LENGTHS, seed=5)
    A_T = x.seg.spread(group_advantages(x.reward_GK, x.seg.valid_GK, "unbiased"))
    plain_T = DAPO()(x).loss
    dual_T = torch.where(A_T < 0, torch.minimum(plain_T, -1.5 * A_T * x.correction_T), plain_T)
    assert (dual_T < plain_T).any()
    assert_close(DAPO(delta=1.5)(x).loss, dual_T)


def test_grpo_kl_at_policy_equals_reference_is_grpo() -> None:
    x = random_input(GRPOKL(), LENGTHS, seed=5)
    at_ref = change(x, ref=x.policy_T.detach())
    assert_close(loss_and_grad(GRPOKL(), at_ref), loss_and_grad(GRPO(), change(x, ref=None)))
    moved, plain = loss_and_grad(GRPOKL(beta=0.5), x), loss_and_grad(GRPO(), change(x, ref=None))
    kl_T = GRPOKL()(x).metrics["grpo_kl/kl"]
    assert_close(moved[0], plain[0] + 0.5 * x.seg.mean(kl_T))
    per_token_T = x.seg.spread(1 / x.seg.length_GK / x.seg.valid_GK.sum())
    assert_close(moved[1], plain[1] + 0.5 * per_token_T * (1 - (x.ref_T - x.policy_T.detach()).exp()))


# What they promise


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_equal_rewards_have_no_loss_and_count(head: Head) -> None:
    """The group's gradient is exactly 0; that of the others is what it is in the same average with any rewards."""
    x = with_correction(random_input(head, PAIRS, seed=5))
    if head.needs.reference:
        x = change(x, ref=x.policy_T.detach())  # no KL term
    before_T = loss_and_grad(head, x)[1]
    equal = change(x, reward=x.reward_GK.index_fill(0, torch.tensor([1]), 0.1))
    loss, after_T = loss_and_grad(head, equal)
    mine_T = x.seg.slot_T // 2 == 1
    assert (loss[mine_T] if loss.ndim == 1 else loss[1]).abs().max() == 0
    assert after_T[mine_T].abs().max() == 0
    assert_close(after_T[~mine_T], before_T[~mine_T], rtol=0, atol=0)
    share = "agree" if isinstance(head, GRPO2) else "zero_std"
    flag_G = next(v for name, v in head(equal).metrics.items() if name.endswith(f"/{share}"))
    assert flag_G.tolist() == [0, 1, 0, 0]


def test_grpo2_leaves_out_groups_of_another_size() -> None:
    x = random_input(GRPO2(), LENGTHS, seed=5)
    out, (_, grad_T) = GRPO2()(x), loss_and_grad(GRPO2(), x)
    two_G = x.seg.valid_GK.sum(-1) == 2
    assert out.metrics["grpo2/other_size"].tolist() == (~two_G).double().tolist() == [1, 0, 1, 0]
    assert out.metrics["grpo2/agree"].tolist() == [0, 0, 0, 0]
    assert (out.loss[~two_G] == 0).all()
    assert (grad_T[~two_G[x.seg.slot_T // 4]] == 0).all()
    assert (out.loss[two_G].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_a_correction_scales_all_but_the_kl_term(head: Head) -> None:
    x = random_input(head, PAIRS, seed=5)
    once, thrice = (head(with_correction(x, c)).loss for c in (1.0, 3.0))
    if isinstance(head, GRPOKL):
        kl_GK = head.beta * x.seg.mean(head(x).metrics["grpo_kl/kl"])
        once, thrice = once - kl_GK, thrice - kl_GK
    assert_close(thrice, 3 * once)


@pytest.mark.parametrize("head", [GRPO(), DAPO(), DrGRPO(), GSPO(epsilon_low=0.2, epsilon_high=0.3)], ids=name_of)
def test_metrics_say_where_the_clip_ended_the_gradient(head: Head) -> None:
    x = random_input(head, LENGTHS, seed=3)
    x = change(x, policy_T=x.old_T + 2 * (x.policy_T.detach() - x.old_T))
    _, grad_T = loss_and_grad(head, x)
    low, high = (v for name, v in head(x).metrics.items() if "/clip_" in name)
    ended = low + high
    assert low.any()
    assert high.any()
    assert_close((grad_T == 0).double(), ended if ended.ndim == 1 else x.seg.spread(ended))


@pytest.mark.parametrize("head", [GRPO(), DAPO(), DrGRPO()], ids=name_of)
def test_any_cut_into_micro_batches_gives_the_same_gradient(head: Head) -> None:
    x = random_input(head, LENGTHS, seed=5)
    over = scope(head.needs)
    counts = {over: float(counted(x, over).sum())}
    total = sum(objective([Term(head)], only(x, g), counts, [{}]).loss for g in range(len(LENGTHS)))
    (cut_T,) = torch.autograd.grad(total, x.policy_T)
    assert_close(cut_T, loss_and_grad(head, x)[1])

"""What the heads from offline reinforcement learning and from negatives say of other heads, and what they promise."""

from __future__ import annotations

import pytest
import torch
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.heads.a_lol import ALoL
from po.heads.a_lol_kl import ALoLKL
from po.heads.a_lol_ref_free import ALoLRefFree
from po.heads.a_lol_seq import ALoLSeq
from po.heads.nat import NAT
from po.heads.redi import REDI
from po.heads.sft import SFT
from po.heads.topr import TOPR
from po.types import Head, HeadInput

LENGTHS = ((2, 1, 3, 1), (1, 3), (2, 1, 1), (2,))
RATIO = [ALoL(), ALoLSeq()]


def same(a: Head, b: Head, x: HeadInput) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, x), rtol=1e-12, atol=1e-14)


def scored(same: bool = False) -> HeadInput:
    return random_input(ALoL(), LENGTHS, seed=3, same=same)


@pytest.mark.parametrize("head", RATIO, ids=name_of)
def test_a_lol_with_ratios_of_one_has_no_reference(head: Head) -> None:
    """At policy == reference; nowhere else."""
    same(head, ALoLRefFree(), scored(same=True))
    assert not torch.allclose(head(scored()).loss, ALoLRefFree()(scored()).loss)


def test_a_lol_seq_on_one_token_responses_is_a_lol() -> None:
    same(ALoLSeq(), ALoL(), random_input(ALoL(), [[1, 1, 1], [1, 1]], seed=3))


def test_a_lol_kl_tends_to_ref_free() -> None:
    x = scored()
    assert_close(loss_and_grad(ALoLKL(beta=1e-12), x), loss_and_grad(ALoLRefFree(), x), rtol=1e-9, atol=1e-9)


def test_an_advantage_of_one_is_the_summed_nll() -> None:
    """Every response one above the value: the sum of SFT's token losses."""
    x = scored()
    x = change(x, reward=x.column_G("value")[:, None].expand_as(x.reward_GK) + 1)
    loss_GK = ALoLRefFree()(x).loss
    assert_close(loss_GK.sum(), SFT()(x).loss.sum())


@pytest.mark.parametrize("head", [*RATIO, ALoLRefFree(), ALoLKL()], ids=name_of)
def test_what_is_not_better_than_expected_says_nothing(head: Head) -> None:
    """No loss and no gradient at or below the value, and metrics say how much is left."""
    x = scored()
    value_G = x.column_G("value")
    x = change(x, reward=value_G[:, None] + torch.tensor([0.0, -1.0, -1e6, 2.0], dtype=F64))
    loss_GK, grad_T = loss_and_grad(head, x)
    kept_GK = torch.zeros_like(x.seg.valid_GK)
    kept_GK[0, 3] = True
    assert (loss_GK[~kept_GK] == 0).all()
    assert (grad_T[~x.seg.spread(kept_GK)] == 0).all()
    assert (grad_T[x.seg.spread(kept_GK)] < 0).all()
    (kept,) = (v for k, v in head(x).metrics.items() if k.endswith("/kept"))
    assert_close(kept, kept_GK.double())


@pytest.mark.parametrize(("shift", "weight"), [(0.0, 1.0), (0.2, 1.221402758), (50.0, 1.9), (-50.0, 0.1)])
def test_a_lol_clips_its_ratio(shift: float, weight: float) -> None:
    x = change(input_from_logratios([[shift]], [[1.0]]), columns={"value": torch.zeros(1, dtype=F64)})
    for head, name in ((ALoL(), "a_lol"), (ALoLSeq(), "a_lol_seq")):
        assert head(x).metrics[f"{name}/weight"].item() == pytest.approx(weight)
        assert_close(loss_and_grad(head, x)[1], torch.tensor([-weight], dtype=F64))


def test_redi_is_simpo_where_its_beta_vanishes() -> None:
    """Symmetric REDI's gradient is (2 / b) that of -log s(b (mean log pi_w - mean log pi_l)) as b -> 0."""
    x = random_input(REDI())
    policy_T = x.policy_T.detach().requires_grad_(True)
    chosen_G, rejected_G = x.seg.mean(policy_T).unbind(-1)
    simpo = -logsigmoid(1e-7 * (chosen_G - rejected_G)).mean()
    (grad_T,) = torch.autograd.grad(simpo, policy_T)
    assert_close(loss_and_grad(REDI(alpha=1.0), x)[1], 2e7 * grad_T, rtol=1e-6, atol=1e-9)


def test_redi_without_negatives_is_sft_by_the_response() -> None:
    """alpha = 0: the chosen response's mean NLL; on pairs of one token, SFT itself."""
    x = random_input(REDI(), [[1, 1]] * 3)
    assert_close(loss_and_grad(REDI(alpha=0.0), x)[1], loss_and_grad(SFT(), change(x, best_first=True))[1])


def test_nat_weighing_alike_is_sft_on_all_rows() -> None:
    x = random_input(NAT())
    assert_close(loss_and_grad(NAT(), x), loss_and_grad(SFT(), change(x, label=None)))


def test_nat_without_negatives_leaves_their_gradient_out() -> None:
    x = change(random_input(NAT()), label=torch.tensor([[1], [-1], [1], [-1]]))
    negative_T = x.seg.spread(x.label_GK) < 0
    _, grad_T = loss_and_grad(NAT(negative_weight=0.0), x)
    assert (grad_T[negative_T] == 0).all()
    assert (grad_T[~negative_T] == -1 / x.policy_T.numel()).all()
    assert NAT()(x).metrics["nat/negative_tokens"].sum() == negative_T.sum()


def sampled(change_of: float, label: int) -> HeadInput:
    """One response of one token that has become e^change_of times as likely since it was sampled."""
    x = input_from_logratios([[change_of]])
    return change(x, old=x.ref_T, ref=None, label=torch.tensor([[label]]))


def slope(head: Head, x: HeadInput) -> Tensor:
    return loss_and_grad(head, x)[1][0]


@pytest.mark.parametrize("change_of", [-800.0, -5.0, -0.5, 0.0, 0.5, 800.0])
def test_topr_tapers_negatives_alone(change_of: float) -> None:
    """Positives weigh 1; negatives no more than 1, and die out as they become unlikely: their pull is bounded."""
    assert slope(TOPR(), sampled(change_of, 1)) == -1
    weight = min(torch.tensor(change_of, dtype=F64).exp().item(), 1.0)
    assert slope(TOPR(), sampled(change_of, -1)).item() == pytest.approx(weight)
    assert slope(TOPR(truncate_positives=True), sampled(change_of, 1)).item() == pytest.approx(-weight)
    faded = TOPR()(sampled(change_of, -1)).metrics["topr/faded"].item()
    assert faded == (weight < 0.1)


def test_topr_s_baseline_shifts_the_share_of_positives() -> None:
    """p (1 - c) / (1 + c (1 - 2 p)): the share of positives in the summed weights, one of four positive, c = 0.4."""
    c, p = 0.4, 0.25
    positive = -slope(TOPR(baseline=c), sampled(0.0, 1)).item()
    negative = slope(TOPR(baseline=c), sampled(0.0, -1)).item()
    assert (positive, negative) == (pytest.approx(1 - c), pytest.approx(1 + c))
    share = p * positive / (p * positive + (1 - p) * negative)
    assert share == pytest.approx(p * (1 - c) / (1 + c * (1 - 2 * p)))

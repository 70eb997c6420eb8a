"""Policy-gradient heads beyond the GRPO family against figures of an independent float64 script, to 6 decimals, on four
responses of one prompt. Their formulas: tests/test_golden_online.py."""

from __future__ import annotations

import pytest
import torch
from heads_golden import from_sums
from heads_support import F64, change, grid, loss_and_grad, parts, segments
from torch import Tensor
from torch.testing import assert_close

from po.heads.bcpg_nsa import BCPGNSA
from po.heads.capo import CAPO
from po.heads.gcpo_gold import GCPOGold
from po.heads.nft import NFT
from po.heads.ppo import PPO
from po.heads.reinforce_pp import ReinforcePP
from po.heads.rloo import RLOO
from po.heads.rloo_ref_free import RLOORefFree
from po.heads.sapo import SAPO
from po.heads.vespo import VESPO
from po.numeric import leave_one_out, whiten
from po.types import Head, HeadInput

LOGP = [[-1, -0.5, -2, -0.3], [-0.7, -1.2, -0.9], [-0.4, -1.5], [-2.2, -0.1, -0.6, -1.1]]
OLD = [[-1.05, -0.2, -2.25, -0.3], [-1.1, -1.1, -0.55], [-0.35, -1.65], [-3.4, -0.12, -0.1, -1.09]]
REF = [[-1.1, -0.3, -2.3, -0.35], [-0.6, -1.4, -0.9], [-0.7, -1.2], [-2.4, -0.2, -0.5, -1.1]]
ADVANTAGE = [0.7, -1.1, 0.4, -0.3]
CLIP = [-0.045993, -0.032411, 0, -0.04375, 0.136751, 0.082943, 0, -0.047561, -0.058092, 0.062252, 0.019129, 0, 0.018563]


def vector_input(rewards: list[float], **fields: Tensor) -> HeadInput:
    """The four responses, and further ones of one token where there are further rewards."""
    more = [[-1.0]] * (len(rewards) - 4)
    logp, old, ref = (
        torch.tensor([v for row in [*table, *more] for v in row], dtype=F64) for table in (LOGP, OLD, REF)
    )
    seg = segments([[*map(len, LOGP), *map(len, more)]])
    x = HeadInput(seg, logp.requires_grad_(True), old=old, ref=ref, reward=grid([rewards]))
    return change(x, correction=torch.ones_like(old), **fields)


def check_vector(head: Head, x: HeadInput, loss: float, grad: list[float]) -> None:
    """The mean over the units of the four responses, and its gradient."""
    found, grad_T = loss_and_grad(head, x)
    over = 13 if head.needs.unit == "token" else 4
    assert found.flatten()[:over].mean().item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T[:13] * found.numel() / over, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


def rows(*values: float) -> list[float]:
    """One value for all tokens of each of the four responses."""
    return [v for v, row in zip(values, LOGP, strict=True) for _ in row]


FIFTH = [*ADVANTAGE, 0.3]  # a fifth response makes these rewards their own advantages


def test_sapo_vector() -> None:
    grad = [-0.045963, -0.031873, -0.055058, -0.04375, 0.128024, 0.082737, 0.063068, -0.047533, -0.057713]
    grad += [0.018423, 0.019127, 0.010901, 0.018563]
    check_vector(SAPO(scale="none"), vector_input(FIFTH), 0.139143, grad)


def test_vespo_vector() -> None:
    grad = rows(-0.053846, 0.080291, -0.027413, 0.024553)
    check_vector(VESPO(scale="none"), vector_input(FIFTH), -0.066329, grad)


def test_rloo_ref_free_vector() -> None:
    """Rewards of which the leave-one-out advantages are the given ones."""
    x = vector_input([a * 4 / 5 for a in FIFTH])
    check_vector(RLOORefFree(), x, 0.12862, rows(-0.175, 0.261588, -0.110517, 0.152549))


def test_rloo_vectors() -> None:
    logp, ref, old = [-12.3, -15.1, -9.8, -20.4], [-13.0, -14.2, -10.5, -19.9], [-12.5, -14.9, -10.3, -20.1]
    lengths, reward = [[7, 9, 5, 11]], [[1.2, -0.4, 0.3, -1.5]]
    x = from_sums([logp], [ref], lengths, reward)
    x = change(x, old=from_sums([old], [ref], lengths, reward).policy_T.detach())
    x = change(x, correction=torch.ones_like(x.ref_T))
    kl_GK = RLOO()(x).metrics["rloo/kl"]
    A_GK = leave_one_out(x.reward_GK - 0.05 * kl_GK, x.seg.valid_GK)
    assert A_GK[0].tolist() == pytest.approx([1.696667, -0.356667, 0.516667, -1.856667], abs=6e-7)
    loss_GK, grad_T = loss_and_grad(RLOO(beta=0.05), x)
    assert loss_GK.mean().item() == pytest.approx(-0.219663, abs=6e-7)
    assert_close(grad_T, x.seg.spread(grid([[0.0, 0.073003, 0.0, 0.0]])), rtol=0, atol=6e-7)


def test_reinforce_pp_vectors() -> None:
    """The figure takes the KL at the policy's log-probs, as at the time of sampling, and the ratio against others."""
    x = vector_input([1.0, 0.0, 1.0, 0.0])
    x = change(x, ref=x.ref_T + x.old_T - x.policy_T.detach())
    returns_T = ReinforcePP(beta=0.1)(x).metrics["reinforce_pp/return"]
    expected = [0.975, 0.985, 0.965, 0.995, -0.01, -0.02, 0, 1, 1.03, -0.02, 0, 0.01, 0]
    assert returns_T.tolist() == pytest.approx(expected, abs=6e-7)
    white = [1.046057, 1.066159, 1.025956, 1.086261, -0.933952, -0.954054, -0.913851, 1.096312, 1.156616]
    white += [-0.954054, -0.913851, -0.893749, -0.913851]
    assert whiten(returns_T, returns_T < 9).tolist() == pytest.approx(white, abs=6e-7)
    grad = [-0.084592, -0.060756, 0, -0.083559, 0.107176, 0.066405, 0, -0.080219, -0.103369, 0.243659, 0.071716, 0]
    check_vector(ReinforcePP(beta=0.1), x, 0.162593, [*grad, 0.069597])


def test_capo_vectors() -> None:
    """The first phase, and after it GRPO's figure."""
    x = vector_input(FIFTH, progress=torch.tensor(0.1, dtype=F64))
    first = [v if a > 0 else 0.0 for v, a in zip(CLIP, rows(*ADVANTAGE), strict=True)]
    check_vector(CAPO(scale="none"), x, -0.280307, first)
    check_vector(CAPO(scale="none", phase=0.1), x, 0.127665, CLIP)


def with_value(x: HeadInput, value: list[float], old: list[float]) -> HeadInput:
    gates = ({"value": torch.tensor(v, dtype=F64)} for v in (value, old))
    return change(x, gates=next(gates), old_gates=next(gates))


def test_ppo_policy_vectors() -> None:
    """Without values and KL each token's advantage is its response's reward."""
    x = with_value(vector_input(ADVANTAGE), [0.0] * 13, [0.0] * 13)
    grad = [-0.056607, -0.03989, 0, -0.053846, 0.126231, 0.076563, 0, -0.029269, -0.035749, 0.076618, 0.023543, 0]
    plain = {"beta": 0.0, "lam": 1.0, "whiten": False, "vf_coef": 0.0}
    check_vector(PPO(**plain), x, 0.131981, [*grad, 0.022847])
    grad[9] = 0.0  # a ratio of 3.32
    check_vector(PPO(**plain, dual_clip=True), x, 0.124594, [*grad, 0.022847])


def one_response(token_rewards: list[float], value: list[float], old: list[float]) -> HeadInput:
    """The last reward is the response's, the others are the KL's at beta = 1."""
    kl = torch.tensor([*(-r for r in token_rewards[:-1]), 0.0], dtype=F64)
    policy_T = torch.full_like(kl, -1.0).requires_grad_(True)
    x = HeadInput(segments([[4]]), policy_T, ref=-1.0 - kl, old=policy_T.detach(), reward=grid([token_rewards[-1:]]))
    return with_value(change(x, correction=torch.ones_like(kl)), value, old)


def test_gae_vector() -> None:
    value = [0.2, 0.1, 0.4, 0.6]
    returns_T = PPO(beta=1.0)(one_response([-0.01, 0.02, -0.03, 1.0], value, value)).metrics["ppo/return"]
    assert returns_T.tolist() == pytest.approx([0.890375, 0.9425, 0.95, 1.0], abs=6e-7)
    gae_T = returns_T - torch.tensor(value, dtype=F64)
    white_T = whiten(gae_T, torch.ones(4, dtype=torch.bool), unbiased=True)
    assert gae_T.tolist() == pytest.approx([0.690375, 0.8425, 0.55, 0.4], abs=6e-7)
    assert white_T.tolist() == pytest.approx([0.367535, 1.170208, -0.373141, -1.164602], abs=6e-7)


def test_ppo_value_vector() -> None:
    """Rewards whose sums to come are the returns of the figure: with lam = 1 they do not depend on values."""
    x = one_response([-0.052125, -0.0075, -0.05, 1.0], [0.2, 0.1, 0.4, 0.6], [0.5, 0.1, 0.3, 0.6])
    value_T = x.gate_T("value").requires_grad_(True)
    head = PPO(beta=1.0, lam=1.0, vf_coef=1.0)
    assert head(x).metrics["ppo/value_loss"].mean().item() == pytest.approx(0.206115, abs=6e-7)
    (grad_T,) = torch.autograd.grad(parts(head, x).loss, value_T)
    assert grad_T.tolist() == pytest.approx([-0.172594, -0.210625, -0.1375, -0.1], abs=6e-7)


NFT_LINEAR = [*[-0.038462] * 4, 0.057378, 0.031777, 0.020924, *[-0.038462] * 2, 0.127697, 0.039239, 0.016741, 0.037704]
NFT_SHARP = [*[-0.038462] * 4, 0.11291, 0.031777, 0.020924, *[-0.038462] * 2, 12.76968, 0.040048, 0.016741, 0.037704]
NFT_SQRT = [*[-0.076923] * 4, 0.114756, 0.063555, 0.041848, *[-0.076923] * 2, 0.255394, 0.078477, 0.033482, 0.075407]


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (NFT(), -0.030437, NFT_LINEAR),
        (NFT(omega="sqrt"), -0.060873, NFT_SQRT),
        (NFT(epsilon=0.01), 0.173506, NFT_SHARP),
    ],
    ids=["linear", "sqrt", "sharp"],
)
def test_nft_vectors(head: NFT, loss: float, grad: list[float]) -> None:
    check_vector(head, vector_input([1.0, 0.0, 1.0, 0.0]), loss, grad)


def test_nft_vector_of_rejection_sampling() -> None:
    """Two of eight are right; the last four are not in the figure."""
    x = vector_input([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    check_vector(NFT(neg_weight=0.0), x, -0.005769, rows(-0.057692, 0.0, -0.057692, 0.0))


def test_gcpo_gold_vector() -> None:
    x = vector_input([0.0, 0.0, 0.0, 1.0], response_columns={"gold": grid([[0.0, 0.0, 0.0, 1.0]])})
    check_vector(GCPOGold(), x, 0.005015, rows(0.036084, 0.047317, 0.075869, -0.108253))


def test_bcpg_nsa_vector() -> None:
    steps = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0], dtype=F64)
    x = vector_input([1.0, -1.0, 1.0, -1.0], token_columns={"correct_step": steps})
    grad = [g * (1 - s) for g, s in zip(rows(-0.062109, 0.083611, -0.125, 0.062812), steps.tolist(), strict=True)]
    check_vector(BCPGNSA(tau=0.1), x, 0.184703, grad)

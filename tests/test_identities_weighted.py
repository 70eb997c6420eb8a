"""Pair heads that add to DPO's loss, weigh it or replace its reference: what they have in common with it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from heads_golden import PAIR_LENGTHS, PAIR_LOGP, PAIR_REF, from_sums
from heads_support import F64, change, grid, input_from_logratios, loss_and_grad, name_of, random_input, segments
from pairs_support import EVERYTHING, column, pairs, same, step_loss
from torch.testing import assert_close

from po.heads.bvpo import BVPO
from po.heads.cream import CREAM
from po.heads.dpo import DPO
from po.heads.dpop import DPOP
from po.heads.hybrid_dpo import HybridDPO
from po.heads.rpo_sft import RPOSft
from po.heads.sem_dpo import SemDPO
from po.heads.sft import SFT
from po.heads.wpo import WPO
from po.heads.wpo_unaligned import WPOUnaligned
from po.spec import Term
from po.types import Head

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]


def test_dpop_pushes_a_fallen_response_back_with_one_plus_lambda() -> None:
    x = input_from_logratios([[-0.5, -3.0]])
    _, grad_T = loss_and_grad(DPOP(beta=0.1, lam=4.0), x)
    assert grad_T[0].item() == pytest.approx(-5 * grad_T[1].item())
    assert DPOP()(x).metrics["dpop/penalty"].tolist() == [0.5]


def test_regularised_po_with_token_means_is_dpo_plus_sft_on_equal_lengths() -> None:
    x = change(random_input(EVERYTHING, [[3, 5], [3, 2], [3, 1]]), best_first=True)
    regularised = step_loss([Term(RPOSft(beta=0.1, eta=0.2, sft_reduction="token_mean"))], x)
    assert_close(regularised, step_loss([Term(DPO(beta=0.1)), Term(SFT(), 0.2)], x))


def test_the_two_reductions_differ_by_beta_times_the_length() -> None:
    x = random_input(EVERYTHING, [[3, 5], [3, 2]])
    same(RPOSft(beta=0.1, eta=0.2), RPOSft(beta=0.1, eta=0.2 * 0.1 * 3, sft_reduction="token_mean"), x)


def test_dpo_plus_sft_is_trl_s_form_of_regularised_po() -> None:
    """TRL 1.16 loss_type [sigmoid, sft] with weights [1, 0.005]: the mean is over the tokens of the batch."""
    x = from_sums(PAIR_LOGP, PAIR_REF, PAIR_LENGTHS, [[1.0, 0.0]] * 3)
    loss = step_loss([Term(DPO(beta=0.1)), Term(SFT(), 0.005)], x)
    assert loss.item() == pytest.approx(0.706672, abs=6e-7)
    (grad_T,) = torch.autograd.grad(loss, x.policy_T)
    better, worse = [-0.015939, -0.019052, -0.015773], [0.015626, 0.018739, 0.015460]
    assert_close(grad_T, x.seg.spread(torch.tensor([better, worse], dtype=F64).T), rtol=0, atol=6e-7)


def test_hybrid_dpo_is_dpo_or_reference_free() -> None:
    """By which response the reference prefers: the better one, neither, the worse one."""
    x = input_from_logratios(PAIRS[:3])
    ref_T = torch.tensor([-1.0, -3.0, -2.0, -2.0, -3.0, -1.0], dtype=F64)
    x = change(x, policy_T=(x.logratio_T.detach() + ref_T).requires_grad_(True), ref=ref_T)
    loss_G, grad_T = loss_and_grad(HybridDPO(beta=0.3), x)
    (dpo_G, dpo_T), (free_G, free_T) = (
        loss_and_grad(DPO(beta=0.3), v) for v in (x, change(x, ref=torch.zeros_like(ref_T)))
    )
    assert_close(loss_G, torch.stack([dpo_G[0], dpo_G[1], free_G[2]]))
    assert_close(grad_T, torch.cat([dpo_T[:4], free_T[4:]]))
    assert grad_T[4].abs() > dpo_T[4].abs()  # a stronger pull on the pair that the reference has wrong
    assert HybridDPO()(x).metrics["hybrid_dpo/clipped"].tolist() == [0, 0, 1]


def test_wpo_without_collision_is_unaligned() -> None:
    x = pairs(collision=torch.zeros_like(pairs().policy_T))
    same(WPO(beta=0.1), WPOUnaligned(beta=0.1), x)
    same(WPO(beta=0.1, clamp=True), WPOUnaligned(beta=0.1), x)


def test_wpo_weights_multiply_the_loss_and_its_gradient() -> None:
    """By exactly the product of the two geometric means, or by 1 where that is more and clamp is set."""
    x = change(pairs(), policy_T=pairs().policy_T.detach() / 4, collision=1.5 * pairs().collision_T)
    weight_G = x.seg.mean(x.policy_T - x.collision_T).exp().prod(-1)
    assert weight_G.min() < 1 < weight_G.max()
    loss_G, grad_T = loss_and_grad(DPO(beta=0.1), x)
    for head, factor_G in ((WPO(beta=0.1), weight_G), (WPO(beta=0.1, clamp=True), weight_G.clamp(max=1))):
        factor_T = x.seg.spread(factor_G[:, None].expand(-1, 2))
        assert_close(loss_and_grad(head, x), (factor_G * loss_G, factor_T * grad_T))
        assert_close(head(x).metrics["wpo/weight"], factor_G)


@pytest.mark.parametrize("V", [2, 50, 150_000])
def test_an_aligned_weight_has_a_bound(V: int) -> None:
    """(sqrt(V) + 1) / 2, at a token of probability 1 / sqrt(V) beside equal others; far below the cap e^20."""
    p_N = torch.cat([torch.linspace(1e-6, 1, 1001, dtype=F64), torch.tensor([V**-0.5], dtype=F64)])
    weight_N = p_N / (p_N**2 + (1 - p_N) ** 2 / (V - 1))
    assert weight_N.max().item() == pytest.approx((math.sqrt(V) + 1) / 2)
    assert weight_N.argmax() == 1001
    assert (math.sqrt(V) + 1) / 2 < math.exp(20)


@pytest.mark.parametrize("e", [0.1, 0.4])
def test_cream_is_conservative_dpo(e: float) -> None:
    same(CREAM(beta=0.3), DPO(beta=0.3, label_smoothing=e), column("consistency", 1 - e))


def test_cream_reverses_the_preference_below_one_half() -> None:
    x = change(input_from_logratios([[0.0, 0.0]] * 3), columns={"consistency": torch.tensor([0.8, 0.5, 0.2]).double()})
    _, grad_T = loss_and_grad(CREAM(beta=0.3), x)
    assert grad_T.tolist() == pytest.approx([-0.03, 0.03, 0, 0, 0.03, -0.03])


def test_sem_dpo_reads_directions_alone() -> None:
    x = pairs()
    y = change(x, embedding=5 * x.embedding_GKE, prompt_embedding=x.prompt_embedding_GE / 7)
    assert_close(loss_and_grad(SemDPO(), y), loss_and_grad(SemDPO(), x))
    z = change(x, embedding=torch.stack([x.prompt_embedding_GE, x.embedding_GKE[:, 1]], 1))
    same(SemDPO(beta=0.1, alpha=4.0), DPO(beta=0.1), z)


def test_sem_dpo_of_a_zero_embedding_is_finite() -> None:
    x = pairs(prompt_embedding=torch.zeros(3, 3, dtype=F64))
    assert SemDPO()(x).metrics["sem_dpo/distance"].tolist() == [1, 1, 1]


def test_bvpo_of_equally_many_pairs_with_weight_two_is_the_paper_s_mixture() -> None:
    """alpha E_trace[DPO] + (1 - alpha) E_empty[DPO]."""
    x = input_from_logratios(PAIRS)
    thinking_G = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64)
    x = change(x, columns={"thinking": thinking_G})
    dpo_G, _ = loss_and_grad(DPO(beta=0.1), x)
    trace, empty = dpo_G[[0, 3]].mean(), dpo_G[[1, 2]].mean()
    assert_close(step_loss([Term(BVPO(alpha=0.3), 2.0)], x).detach(), 0.3 * trace + 0.7 * empty)
    metrics = BVPO(alpha=0.3)(x).metrics
    assert_close(metrics["bvpo/trace"], dpo_G * thinking_G)
    assert_close(metrics["bvpo/empty"], dpo_G * (1 - thinking_G))


@pytest.mark.parametrize("head", [CREAM(), BVPO(), SemDPO()], ids=name_of)
def test_a_filler_group_s_columns_and_embeddings_do_not_matter(head: Head) -> None:
    """An empty group carries NaN there: the objective and its gradient stay as they are, in every log-prob."""
    x = pairs()
    seg = segments([[3, 5], [1, 2], [4, 1]])
    filler = change(
        x,
        seg=replace(seg, valid_GK=torch.cat([seg.valid_GK, torch.zeros(1, 2, dtype=torch.bool)])),
        columns={k: torch.cat([t, torch.tensor([math.nan])]) for k, t in x.columns.items()},
        embedding=torch.cat([x.embedding_GKE, torch.full((1, 2, 3), math.nan)]),
        prompt_embedding=torch.cat([x.prompt_embedding_GE, grid([[math.nan] * 3])]),
    )
    loss_G, grad_T = loss_and_grad(head, x)
    filled_G, filled_T = loss_and_grad(head, filler)
    assert_close(filled_G[:3], loss_G)
    assert_close(filled_T, grad_T)

"""What the token-level and distilling heads say of one another and of DPO, and where they converge."""

from __future__ import annotations

import math

import pytest
import torch
from heads_support import F64, change, loss_and_grad, name_of, random_input, segments
from torch import Tensor
from torch.testing import assert_close

from po.heads.adpa import ADPA
from po.heads.bmc import BMC
from po.heads.dckd import DCKD
from po.heads.dpo import DPO
from po.heads.mapo import MaPO
from po.heads.sft import SFT
from po.heads.sparsepo import SparsePO
from po.heads.tdpo1 import TDPO1
from po.heads.tdpo2 import TDPO2
from po.types import Head, HeadInput


def pairs(mask_u: Tensor | float = 1.0, mask_d: Tensor | float = 1.0) -> HeadInput:
    """Random pairs with KL, edits and masks."""
    x = random_input(TDPO1.needs, seed=4)
    one_T = torch.ones_like(x.ref_T)
    differs_T = torch.arange(len(one_T)) % 3 == 0
    return change(x, differs=differs_T, gates={"mask_u": mask_u * one_T, "mask_d": mask_d * one_T})


def gradients(head: Head, x: HeadInput) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradient of their sum for policy_T and token_kl_T."""
    leaves = [x.policy_T.detach().requires_grad_(True), x.token_kl_T.detach().requires_grad_(True)]
    loss_G = head(change(x, policy_T=leaves[0], token_kl=leaves[1])).loss
    policy_T, kl_T = torch.autograd.grad(loss_G.sum(), leaves, materialize_grads=True, allow_unused=True)
    return loss_G.detach(), policy_T, kl_T


def same(a: Head, b: Head, x: HeadInput) -> None:
    assert_close(gradients(a, x), gradients(b, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("head", [TDPO1(beta=0.3), TDPO2(beta=0.3, alpha=0.7)], ids=name_of)
def test_tdpo_without_kl_is_dpo(head: Head) -> None:
    x = pairs()
    x = change(x, token_kl=torch.zeros_like(x.token_kl_T))
    assert_close(loss_and_grad(head, x), loss_and_grad(DPO(beta=0.3), x), rtol=1e-12, atol=1e-14)


def test_tdpo2_at_alpha_1_is_tdpo1_but_for_the_gradient_of_the_chosen_kl() -> None:
    x = pairs()
    (loss1_G, policy1_T, kl1_T), (loss2_G, policy2_T, kl2_T) = (
        gradients(head, x) for head in (TDPO1(beta=0.3), TDPO2(beta=0.3, alpha=1.0))
    )
    assert_close((loss2_G, policy2_T), (loss1_G, policy1_T))
    chosen_T = x.seg.slot_T % 2 == 0
    assert_close(kl2_T, kl1_T.masked_fill(chosen_T, 0))
    assert (kl1_T[chosen_T] < 0).all()
    assert (kl1_T[~chosen_T] > 0).all()


@pytest.mark.parametrize("common", [True, False])
def test_sparsepo_with_all_masks_1_is_tdpo1(common: bool) -> None:
    same(SparsePO(beta=0.3, common=common), TDPO1(beta=0.3), pairs())


def test_sparsepo_without_the_kl_mask_is_dpo() -> None:
    same(SparsePO(beta=0.3, common=False), DPO(beta=0.3), pairs(mask_d=0.0))


def test_sparsepo_with_dead_masks_teaches_nothing() -> None:
    loss_G, *grads = gradients(SparsePO(beta=0.3), pairs(0.0, 0.0))
    assert_close(loss_G, torch.full_like(loss_G, math.log(2)))
    assert all(g.abs().max() == 0 for g in grads)


def test_a_common_mask_pays_once() -> None:
    """The halves of two equal lambdas add up to one of them."""
    x = pairs(0.5, 0.5)
    loss_G, plain_G = (SparsePO(lambda_u=v, lambda_d=v)(x).loss for v in (0.2, 0.0))
    tokens_G = x.seg.length_GK.sum(-1)
    assert_close(loss_G - plain_G, 0.2 * 0.5 * tokens_G.to(F64))
    apart_G = SparsePO(lambda_u=0.2, lambda_d=0.2, common=False)(x).loss
    assert_close(apart_G - plain_G, 2 * (loss_G - plain_G))


def test_mapo_is_sparsepo_with_its_mask_and_tdpo1_on_single_tokens() -> None:
    x = random_input(MaPO(), seed=4)
    mask_T = MaPO()(x).metrics["mapo/mask"]
    assert mask_T.min() == 0 < mask_T.max() <= 1
    y = change(x, gates={"mask_u": mask_T, "mask_d": mask_T})
    assert_close(gradients(MaPO(beta=0.3), x), gradients(SparsePO(beta=0.3), y))
    same(MaPO(beta=0.3), TDPO1(beta=0.3), random_input(MaPO(), [[1, 1], [1, 1]]))


def test_mapo_keeps_no_gradient_for_its_mask() -> None:
    x = random_input(MaPO())
    loss = MaPO()(x).loss.sum()
    found = torch.autograd.grad(loss, list(x.gates.values()), allow_unused=True)
    assert found == (None,) * 3


@pytest.mark.parametrize("form", ["paper", "code"])
def test_bmc_without_edits_is_dpo(form: str) -> None:
    x = pairs()
    same(BMC(beta=0.3, form=form), DPO(beta=0.3), change(x, differs=torch.zeros_like(x.differs_T)))  # type: ignore[arg-type]


def test_bmc_of_unlikely_tokens_all_edited_is_dpo_with_a_larger_beta() -> None:
    x = pairs()
    x = change(x, policy_T=x.policy_T.detach() - 2, ref=x.ref_T - 2, differs=torch.ones_like(x.differs_T))
    same(BMC(beta=0.1, delta=2.0), DPO(beta=0.3), x)


def test_bmc_s_forms_agree_at_the_reference_only() -> None:
    x = pairs()
    x = change(x, policy_T=x.policy_T.detach() / 10, ref=x.ref_T / 10)  # 1/p below the cap at most tokens
    there = change(x, policy_T=x.ref_T.clone())
    paper, code = BMC(beta=0.5), BMC(beta=0.5, form="code")
    same(paper, code, there)
    assert (paper(x).loss - code(x).loss).abs().max() > 1e-3
    weight_T = BMC(delta=3.0)(x).metrics["bmc/weight"]
    assert (weight_T[~x.differs_T] == 1).all()
    assert weight_T[x.differs_T].min() >= 2
    assert weight_T[x.differs_T].max() <= 4


def stored(student_TM: Tensor, teacher_TM: Tensor, teacher_ref_TM: Tensor) -> HeadInput:
    """One pair with responses of two tokens; what the student says of the tokens that the teacher scored."""
    return HeadInput(
        segments([[2, 2]]), student_TM[:, 0], candidate=student_TM, teacher=teacher_TM, teacher_ref=teacher_ref_TM
    )


def normal(seed: int, M: int = 4) -> Tensor:
    return torch.randn(4, M, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_distillation_without_a_teacher_s_weight_is_sft() -> None:
    """Of one pair: SFT averages over the tokens of a step, DCKD over those of a response."""
    student_TM = normal(0).log_softmax(-1).requires_grad_(True)
    x = stored(student_TM, normal(1).log_softmax(-1), normal(2).log_softmax(-1))
    loss_G = DCKD(sft=1.0, chosen=0.0, rejected=0.0)(x).loss
    assert_close(loss_G[0], SFT()(x).loss[:2].mean())


@pytest.mark.parametrize("head", [DCKD(sft=0.0), DCKD(sft=0.0, chosen=0.0)], ids=name_of)
def test_dckd_converges_to_the_teacher(head: Head) -> None:
    """With all tokens stored: zero loss and gradient at the teacher, and positive beside it."""
    logits_TM, teacher_TM = normal(0), normal(1).log_softmax(-1)
    assert (head(stored(logits_TM.log_softmax(-1), teacher_TM, teacher_TM)).loss > 0.1).all()
    at_TM = (teacher_TM + 3).requires_grad_(True)
    loss_G = head(stored(at_TM.log_softmax(-1), teacher_TM, teacher_TM)).loss
    (grad_TM,) = torch.autograd.grad(loss_G.sum(), at_TM)
    assert loss_G.abs().max() < 1e-14
    assert grad_TM.abs().max() < 1e-14


def test_dckd_does_not_renormalise_what_is_stored() -> None:
    """Two of four tokens stored: the KL is least where they have all of the student's probability, and there it is
    P log P for the teacher's share P."""
    teacher_TV = normal(1).log_softmax(-1)
    share_T = teacher_TV[:, :2].exp().sum(-1)
    best_TM = teacher_TV[:, :2].log_softmax(-1)
    loss_G = DCKD(sft=0.0, rejected=0.0)(stored(best_TM, teacher_TV[:, :2], teacher_TV[:, :2])).loss
    assert_close(loss_G[0], (share_T * share_T.log())[:2].mean())
    assert loss_G[0] < 0


@pytest.mark.parametrize("head", [DCKD(), ADPA()], ids=name_of)
def test_places_without_a_stored_token_change_nothing(head: Head) -> None:
    """-inf at the teacher, whatever the student says of the token that stands there."""
    student_TM, teacher_TM, teacher_ref_TM = (normal(i, 3).log_softmax(-1) for i in range(3))
    loss_G = head(stored(student_TM, teacher_TM, teacher_ref_TM)).loss
    for said in (-0.5, -1000.0, -math.inf, math.nan):
        wide = [
            torch.cat([t, torch.full((4, 2), v)], -1)
            for t, v in ((student_TM, said), (teacher_TM, -math.inf), (teacher_ref_TM, -math.inf))
        ]
        candidate_TM = wide[0].requires_grad_(True)
        again_G = head(change(stored(*wide), policy_T=student_TM[:, 0])).loss
        (grad_TM,) = torch.autograd.grad(again_G.sum(), candidate_TM)
        assert_close(again_G, loss_G)
        assert grad_TM.isfinite().all()
        assert grad_TM[:, 3:].abs().max() == 0


def test_adpa_s_gradient_is_the_centred_advantage() -> None:
    """-pi (A - sum pi A) per token of the rejected side; none where A is the same for the whole vocabulary."""
    logits_TM = normal(0).requires_grad_(True)
    p_TM, q_TM = normal(1).log_softmax(-1), normal(2).log_softmax(-1)
    loss_G = ADPA(sft=0.0, advantage=2.0)(stored(logits_TM.log_softmax(-1), p_TM, q_TM)).loss
    (grad_TM,) = torch.autograd.grad(loss_G.sum(), logits_TM)
    pi_TM, a_TM = logits_TM.detach().softmax(-1), p_TM - q_TM
    want_TM = -pi_TM * (a_TM - (pi_TM * a_TM).sum(-1, keepdim=True))
    assert grad_TM[:2].abs().max() == 0
    assert_close(grad_TM[2:], 2.0 * want_TM[2:] / 2)  # the mean over two tokens
    flat_G = ADPA(sft=0.0)(stored(logits_TM.log_softmax(-1), p_TM, p_TM - 0.7)).loss
    (grad_TM,) = torch.autograd.grad(flat_G.sum(), logits_TM)
    assert_close(flat_G, torch.tensor([-0.7], dtype=F64))
    assert grad_TM.abs().max() < 1e-15


def test_adpa_alone_ends_at_the_token_with_the_largest_advantage() -> None:
    logits_TM = torch.zeros(4, 4, dtype=F64, requires_grad=True)
    p_TM, q_TM = normal(1).log_softmax(-1), normal(2).log_softmax(-1)
    optimizer = torch.optim.Adam([logits_TM], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ADPA(sft=0.0)(stored(logits_TM.log_softmax(-1), p_TM, q_TM)).loss.sum().backward()
        optimizer.step()
    best_T = (p_TM - q_TM)[2:].argmax(-1)
    assert (logits_TM.detach()[2:].softmax(-1).gather(-1, best_T[:, None]) > 0.99).all()

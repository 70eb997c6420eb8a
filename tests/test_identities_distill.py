"""What the self-distillation heads, generalised JSD and XPO say of one another and of known heads, and that their
surrogates have the gradients of the divergences that they stand for."""

from __future__ import annotations

import pytest
import torch
from heads_support import F64, Lengths, change, loss_and_grad, name_of, parts, random_input, segments
from torch import Tensor
from torch.testing import assert_close

from po.heads.dckd import DCKD
from po.heads.dpo import DPO
from po.heads.gjsd import GJSD
from po.heads.hindsight import Hindsight
from po.heads.hindsight_online import HindsightOnline
from po.heads.opsd import OPSD
from po.heads.pi_distill import PiDistill
from po.heads.rltf_sd import RLTFSD
from po.heads.sdft import SDFT
from po.heads.selm import SELM
from po.heads.sft import SFT
from po.heads.unisd import UniSD
from po.heads.xpo import XPO
from po.types import Head, HeadInput

ONE: Lengths = ((3,), (1,), (5,), (2,), (1,), (4,))
SETS: Lengths = ((2, 1, 3, 1), (1, 3), (2, 1, 1), (2, 5))
REVERSE = UniSD(gamma=0.0, divergence="reverse", clip=1e6)


def fresh(lengths: Lengths, reward: float | None = None, **fields: Tensor) -> HeadInput:
    """Samples of the policy as it is, with a privileged prompt, the same reward for all unless none is given."""
    x = random_input(OPSD(), lengths, seed=3)
    one_T, reward_GK = torch.ones_like(x.policy_T), x.reward_GK
    if reward is not None:
        reward_GK = torch.full_like(reward_GK, reward)
    x = change(x, old=x.policy_T.detach(), correction=one_T, reward=reward_GK)
    return change(x, token_columns={"spread": torch.linspace(0.1, 2, len(one_T), dtype=F64)}, **fields)


def grad(head: Head, x: HeadInput) -> Tensor:
    return loss_and_grad(head, x)[1]


def grads(head: Head, x: HeadInput) -> tuple[Tensor, Tensor]:
    """Of the mean, for the row's prompt and for the privileged one; 0 where there is none."""
    leaves = [t.detach().requires_grad_(True) for t in (x.policy_T, x.privileged_T)]
    loss = parts(head, change(x, policy_T=leaves[0], privileged=leaves[1])).loss
    a, b = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return a, b


def test_sdft_on_fresh_samples_is_hindsight() -> None:
    """And UniSD without weights, with reverse KL: three names of one surrogate."""
    x = fresh(ONE)
    for head in (SDFT(), REVERSE):
        assert_close(loss_and_grad(head, x), loss_and_grad(Hindsight(), x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "head", [Hindsight(), Hindsight(center=True), HindsightOnline(), SDFT(), OPSD(), PiDistill(alpha=1.0)], ids=name_of
)
def test_a_privileged_prompt_that_says_nothing_teaches_nothing(head: Head) -> None:
    x = fresh(SETS, reward=0.5)
    assert grad(head, x).abs().max() > 0 or isinstance(head, PiDistill)
    x = change(x, privileged=x.policy_T.detach().clone())
    assert_close(torch.stack(grads(head, x)), torch.zeros(2, len(x.policy_T), dtype=F64))


def test_a_constant_in_the_signal_is_seen_without_center_only() -> None:
    x = fresh(ONE)
    y = change(x, privileged=x.privileged_T + 0.7)
    for head in (Hindsight(center=True), HindsightOnline()):
        assert_close(grad(head, x), grad(head, y))
    assert not torch.allclose(grad(Hindsight(), x), grad(Hindsight(), y))


def test_hindsight_online_at_the_sampler_is_centred_hindsight() -> None:
    assert_close(grad(HindsightOnline(), fresh(ONE)), grad(Hindsight(center=True), fresh(ONE)))


def test_ignored_tokens_are_as_if_cut_off() -> None:
    x, long_T = fresh(ONE), torch.ones(16, dtype=torch.bool)
    long_T[[0, 3, 4, 9, 11, 12]] = False  # the first of each
    seg = segments([[2], [0], [4], [1], [0], [3]])
    cut = change(x, seg=seg, policy_T=x.policy_T.detach()[long_T], privileged=x.privileged_T[long_T])
    assert_close(Hindsight(ignore_first_k=1)(x).loss, Hindsight()(cut).loss)


def table(seed: int) -> tuple[Tensor, Tensor, HeadInput]:
    """One-token responses, one for each of 5 tokens: what a sampler could draw, with student and teacher as tables."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, generator=rng, dtype=F64) for _ in range(2))
    student.requires_grad_(True)
    logp, told = student.log_softmax(-1), teacher.log_softmax(-1)
    one = torch.ones(5, dtype=F64)
    x = HeadInput(segments([[1]] * 5), logp, old=logp.detach(), privileged=told, correction=one)
    return student, told, change(x, token_columns={"spread": 0 * one})


@pytest.mark.parametrize("head", [Hindsight(), SDFT(), REVERSE, UniSD(clip=1e6)], ids=name_of)
def test_the_expected_gradient_is_the_divergence_s(head: Head) -> None:
    """Reverse KL to the teacher; forward KL for UniSD's default."""
    for seed in range(5):
        student, told, x = table(seed)
        loss = (x.policy_T.detach().exp() * head(x).loss[:, 0]).sum()
        logp = student.log_softmax(-1)
        forward = isinstance(head, UniSD) and head.divergence == "forward"
        kl = (told.exp() * (told - logp)).sum() if forward else (logp.exp() * (logp - told)).sum()
        assert_close(*(torch.autograd.grad(v, student, retain_graph=True)[0] for v in (loss, kl)))


def test_opsd_without_differences_of_reward_is_sdft() -> None:
    assert_close(grad(OPSD(beta=0.3), fresh(SETS, reward=0.5)), 0.3 * grad(SDFT(), fresh(SETS)))


def test_opsd_without_teacher_is_rltf_sd_against_its_own_mean() -> None:
    """Both are REINFORCE with the group's mean as the baseline."""
    x = fresh(SETS)
    x = change(x, response_columns={"first_reward": x.reward_GK})
    assert_close(grad(OPSD(beta=0.0, scale="none"), x), grad(RLTFSD(), x))


def test_rltf_sd_feels_a_constant_in_the_first_rewards() -> None:
    """By that constant times the gradient of the likelihood: on samples of another prompt it does not average out."""
    x = fresh(SETS)
    a, b = (change(x, response_columns={"first_reward": x.reward_GK + c}) for c in (0.0, 0.25))
    n = float(x.seg.valid_GK.sum())
    assert_close(grad(RLTFSD(), b) - grad(RLTFSD(), a), torch.full_like(x.old_T, 0.25 / n))


def test_pi_distill_trains_the_side_that_alpha_names() -> None:
    x = fresh(SETS)
    x = change(x, old=x.privileged_T)
    for alpha, trained in ((0.0, [True, False]), (1.0, [False, True]), (0.5, [True, True])):
        assert [bool(g.abs().max() > 0) for g in grads(PiDistill(alpha=alpha), x)] == trained


def test_pi_distill_s_halves_are_known_heads_at_the_sampler() -> None:
    """The teacher's half is OPSD with the prompts exchanged; without differences of reward the student's half is beta
    times likelihood of the teacher's samples, each response by its mean."""
    x = fresh(SETS)
    x = change(x, old=x.privileged_T)
    exchanged = change(x, policy_T=x.privileged_T, privileged=x.policy_T.detach())
    assert_close(grads(PiDistill(alpha=1.0, beta=0.3), x)[1], grads(OPSD(beta=0.3), exchanged)[0])
    equal = change(x, reward=torch.ones_like(x.reward_GK))
    n = (x.seg.spread(x.seg.length_GK) * x.seg.valid_GK.sum()).double()
    assert_close(grads(PiDistill(alpha=0.0, beta=0.3), equal)[0], -0.3 / n)


def test_unisd_s_sequence_weight_cancels_in_the_authors_normalizer() -> None:
    """All but where it makes the weights add up to less than 1."""
    x = fresh(((3,), (5,), (4,)))
    plain, light, heavy = (UniSD(gamma=g, granularity="sequence") for g in (0.0, 0.3, 9.0))
    assert_close(light(x).loss, plain(x).loss)
    assert torch.all((heavy(x).loss / plain(x).loss)[1:] < 0.9)
    kept = UniSD(gamma=0.3, granularity="sequence", normalizer="length")
    assert_close(kept(x).loss / plain(x).loss, (-0.3 * x.seg.mean(x.token_column_T("spread"))).exp())


def test_unisd_listens_less_where_teachers_disagree() -> None:
    weight_T = UniSD(gamma=2.0, q95=0.5)(fresh(((16,),))).metrics["unisd/weight"]
    assert torch.all(weight_T.diff() < 0)
    assert weight_T[0] == pytest.approx(1 / (1 + 2 * 0.1 / 0.5))


def distributions(M: int) -> HeadInput:
    """The first M of 6 tokens are stored, of both responses of two pairs."""
    x = random_input(DCKD(), ((3, 2), (1, 4)), seed=2)
    rng = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(10, 6, generator=rng, dtype=F64).log_softmax(-1)[:, :M] for _ in range(2))
    return change(x, teacher=teacher, candidate=student)


def test_gjsd_forward_is_dckd_s_divergence_where_all_is_stored() -> None:
    x = distributions(6)
    theirs = DCKD(sft=0.0, chosen=1.0, rejected=1.0)(x).loss
    assert_close(x.seg.mean(GJSD(beta=0.0)(x).loss).sum(-1), theirs)


def test_gjsd_has_a_term_sft() -> None:
    x = distributions(6)
    assert_close(GJSD(sft=0.5)(x).loss, GJSD()(x).loss + 0.5 * SFT()(x).loss)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_gjsd_is_a_divergence(beta: float) -> None:
    head = GJSD(beta=beta)
    whole = distributions(6)
    assert torch.all(head(whole).loss > 0)
    for M in (1, 3):
        assert torch.all(head(distributions(M)).loss < head(whole).loss), "fewer stored tokens tell less"
    assert_close(head(distributions(5)).loss, head(whole).loss)  # the others are one token
    x = change(whole, teacher=whole.candidate_TM.detach(), candidate=whole.candidate_TM.clone().requires_grad_(True))
    loss = head(x).loss
    assert_close(loss, torch.zeros_like(loss))
    (slope_TM,) = torch.autograd.grad(loss.sum(), x.candidate_TM)
    p_TM = x.teacher_TM.exp()
    assert_close(slope_TM - p_TM * slope_TM.sum(-1, keepdim=True), torch.zeros_like(p_TM))  # for the logits


def test_gjsd_s_ends_are_not_limits_of_its_middle() -> None:
    x = distributions(6)
    for end, near, scale in ((0.0, 1e-4, 1e-4), (1.0, 1 - 1e-4, 1e-4)):
        middle = GJSD(beta=near)(x).loss
        assert torch.all(middle < 0.01 * GJSD(beta=end)(x).loss)
        assert_close(middle / scale, GJSD(beta=end)(x).loss, rtol=2e-3, atol=0)
    swapped = change(x, teacher=x.candidate_TM, candidate=x.teacher_TM)
    assert_close(GJSD(beta=0.3)(x).loss, GJSD(beta=0.7)(swapped).loss)


PAIRS: Lengths = ((3, 5), (1, 2), (4, 1))


def with_flags(x: HeadInput, flags: list[list[float]]) -> HeadInput:
    return change(x, response_columns={"from_reference": torch.tensor(flags, dtype=F64)})


def test_xpo_without_exploration_is_dpo() -> None:
    x = with_flags(random_input(XPO(), PAIRS), [[1, 0]] * 3)
    assert_close(loss_and_grad(XPO(alpha=0.0), x), loss_and_grad(DPO(), x))
    y = with_flags(x, [[0, 0]] * 3)
    assert_close(loss_and_grad(XPO(alpha=0.3), y), loss_and_grad(DPO(), y))


@pytest.mark.parametrize("own", [0, 1], ids=["the better", "the worse"])
def test_xpo_is_selm_whose_own_response_is_the_reference_s_sample(own: int) -> None:
    """alpha of XPO = alpha beta of SELM; the losses differ by alpha log ref(y'), which has no gradient."""
    beta, alpha = 0.2, 0.3
    pair = with_flags(random_input(XPO(), ((3, 2),)), [[float(own == 0), float(own == 1)]])
    copied = slice(0, 3) if own == 0 else slice(3, 5)
    three = HeadInput(
        segments([[3, 2, 3 if own == 0 else 2]]),
        torch.cat([pair.policy_T, pair.policy_T[copied]]).detach().requires_grad_(True),
        ref=torch.cat([pair.ref_T, pair.ref_T[copied]]),
        label=torch.tensor([[1, -1, 0]]),
    )
    xpo, xpo_T = loss_and_grad(XPO(beta=beta, alpha=alpha * beta), pair)
    selm, selm_T = loss_and_grad(SELM(beta=beta, alpha=alpha), three)
    assert_close(selm + alpha * beta * pair.ref_T[copied].sum(), xpo)
    both_T = selm_T[:5].clone()
    both_T[copied] += selm_T[5:]
    assert_close(both_T, xpo_T)

"""What the heads on sets, labelled groups and probabilities say of other heads, and their degenerate cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input
from torch import Tensor
from torch.testing import assert_close

from po.heads.ampo import AMPO
from po.heads.dpo import DPO
from po.heads.ipo import IPO
from po.heads.irpo_incontext import IRPOInContext
from po.heads.mdpo_multisample import MDPOMultisample
from po.heads.mipo_multisample import MIPOMultisample
from po.heads.mpo_multi import MPOMulti
from po.heads.plackett_luce import PlackettLuce
from po.heads.prob_sft import ProbSFT
from po.heads.prob_sft_threshold import ProbSFTThreshold
from po.heads.ranklist import RankList
from po.heads.refa import REFA
from po.heads.sft import SFT
from po.heads.spo_degree import SPODegree
from po.types import Head, HeadInput

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]
SETS = [[0.5, -0.5, 0.25, -1.0, 2.0], [1.5, -0.25], [0.0, 3.0, -2.0]]
REWARDS = [[4.0, 1.0, 3.0, 0.0, 2.0], [1.0, 4.0], [0.3, 0.2, 0.1]]
ON_SETS = [AMPO(), REFA(), IRPOInContext(), PlackettLuce(), RankList(), RankList(skip=3)]


def same(a: Head, b: Head, x: HeadInput, factor: float = 1.0) -> None:
    loss, grad_T = loss_and_grad(b, x)
    assert_close(loss_and_grad(a, x), (factor * loss, factor * grad_T), rtol=1e-12, atol=1e-14)


def pairs(better: float = 1.0, worse: float = 0.0) -> HeadInput:
    """Better first, as labels and as rewards."""
    x = input_from_logratios(PAIRS, [[better, worse]] * len(PAIRS))
    return change(x, label=torch.tensor([[1, -1]] * len(PAIRS)))


def without_reference(x: HeadInput) -> HeadInput:
    """The policy's log-probs are the log-ratios, and the reference's are 0."""
    return change(x, policy_T=x.logratio_T.detach().requires_grad_(True), ref=torch.zeros_like(x.ref_T))


@pytest.mark.parametrize(
    "head",
    [MDPOMultisample(beta=0.3), PlackettLuce(beta=0.3), RankList(beta=0.3), RankList(beta=0.3, skip=4)],
    ids=name_of,
)
def test_two_responses_are_dpo(head: Head) -> None:
    same(head, DPO(beta=0.3), pairs())


def test_irpo_of_two_is_half_of_dpo() -> None:
    same(IRPOInContext(beta=0.3), DPO(beta=0.3), pairs(1.0, 0.0), factor=0.5)


def test_ampo_of_two_is_dpo_without_a_reference() -> None:
    """Sums and alpha = 0: -log s(b (log pi_w - log pi_l)); with alpha, the margin a b (R_w - R_l) comes on top."""
    x = without_reference(pairs(3.0, 0.5))
    same(AMPO(beta=0.3, alpha=0.0, length_normalize=False), DPO(beta=0.3), x)
    loss_G, _ = loss_and_grad(AMPO(beta=0.3, alpha=0.4, length_normalize=False), x)
    h_G = x.logratio_GK[:, 0] - x.logratio_GK[:, 1]
    assert_close(loss_G, torch.nn.functional.softplus(-0.3 * (h_G + 0.4 * 2.5)).detach())


def test_refa_with_gamma_one_is_signed_mpo_on_one_token_responses() -> None:
    """Where a mean is a sum; mpo_multi's alpha stands outside beta."""
    x = without_reference(input_from_logratios(SETS, REWARDS))
    same(REFA(beta=0.5, alpha=0.6, gamma=1.0), MPOMulti(beta=0.5, alpha=0.3, power=1, signed=True), x)
    same(REFA(beta=0.5, alpha=0.6, gamma=1.0, power=2), MPOMulti(beta=0.5, alpha=0.3, power=2), x)


def test_refa_with_one_best_is_ampo() -> None:
    """One response above the mean, and gamma = 1."""
    x = input_from_logratios(SETS, [[9.0, 1.0, 2.0, 1.5, 0.0], [1.0, 0.0], [-1.0, -9.0, -8.0]])
    same(REFA(beta=0.5, alpha=0.2, gamma=1.0), AMPO(beta=0.5, alpha=0.2), x)


def test_one_response_on_each_side_is_ipo() -> None:
    for unbiased in (True, False):
        same(MIPOMultisample(tau=0.3, unbiased=unbiased), IPO(tau=0.3), pairs())


def test_unlabelled_responses_do_not_count() -> None:
    x = input_from_logratios([[0.5, -0.75, 9.0], [7.0, -1.25, 1.25]])
    x = change(x, label=torch.tensor([[1, -1, 0], [0, 1, -1]]))
    y = change(input_from_logratios([[0.5, -0.75], [-1.25, 1.25]]), label=torch.tensor([[1, -1], [1, -1]]))
    for head in (MDPOMultisample(), MIPOMultisample()):
        assert_close(head(x).loss, head(y).loss)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mipo_is_unbiased(unbiased: bool) -> None:
    """The mean over all samples of two, drawn with replacement from each population, against the squared difference of
    the populations' means: equal with the correction, and without it too large by the variances of the means."""
    better, worse, tau = [0.5, -1.0, 3.0], [-2.0, 0.25, 1.0, -0.5], 0.2
    rows = [[*w, *v] for w in itertools.product(better, repeat=2) for v in itertools.product(worse, repeat=2)]
    x = change(input_from_logratios(rows), label=torch.tensor([[1, 1, -1, -1]] * len(rows)))
    found = MIPOMultisample(tau=tau, unbiased=unbiased)(x).loss.mean().item()
    w, v = torch.tensor(better, dtype=F64), torch.tensor(worse, dtype=F64)
    target = (w.mean() - v.mean() - 1 / (2 * tau)).item() ** 2
    bias = 0.0 if unbiased else (w.var(correction=0) / 2 + v.var(correction=0) / 2).item()
    assert found == pytest.approx(target + bias, rel=1e-12)
    assert unbiased or bias > 0.5


def test_ranklist_with_all_skips_is_plackett_luce() -> None:
    x = input_from_logratios(SETS, REWARDS)
    same(RankList(beta=0.7, skip=4), PlackettLuce(beta=0.7), x)
    same(RankList(beta=0.7, skip=64), PlackettLuce(beta=0.7), change(x, reward=x.reward_GK.round()))  # with ties


def test_ranklist_with_skip_one_is_dpo_over_neighbours() -> None:
    loss_G, _ = loss_and_grad(
        RankList(beta=0.7), input_from_logratios([[2.0, 0.5, -1.0, 0.25]], [[1.0, 4.0, 3.0, 2.0]])
    )
    neighbours = input_from_logratios([[0.5, -1.0], [-1.0, 0.25], [0.25, 2.0]])
    assert_close(loss_G, DPO(beta=0.7)(neighbours).loss.sum()[None])


def test_plackett_luce_probabilities_of_all_orders_add_up_to_one() -> None:
    orders = [list(p) for p in itertools.permutations([1.0, 2.0, 3.0, 4.0])]
    loss_G = PlackettLuce(beta=0.7)(input_from_logratios([[0.5, -1.0, 2.0, 0.1]] * len(orders), orders)).loss
    assert (-loss_G).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_tied_responses_do_not_compete() -> None:
    """Two best and one worst: each best against the worst; equal rewards: nothing."""
    x = input_from_logratios([[0.5, 2.0, -1.0], [0.5, 2.0, -1.0]], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    two = DPO(beta=0.7)(input_from_logratios([[0.5, -1.0], [2.0, -1.0]])).loss.sum()
    for head in (PlackettLuce(beta=0.7), RankList(beta=0.7), RankList(beta=0.7, skip=2)):
        loss_G, grad_T = loss_and_grad(head, x)
        assert_close(loss_G, torch.stack([two, 0 * two]))
        assert grad_T[3:].tolist() == [0, 0, 0]


def test_tied_best_responses_are_all_positive() -> None:
    x = input_from_logratios([[0.5, 2.0, -1.0]], [[1.0, 1.0, 0.0]])
    z_K = 2.0 * x.policy_T.detach() + torch.tensor([2.0, 2.0, 0.0], dtype=F64) * 0.5
    loss_G, grad_T = loss_and_grad(AMPO(beta=2.0, alpha=0.5), x)
    assert_close(loss_G, -(z_K[:2].logsumexp(-1) - z_K.logsumexp(-1))[None])
    assert (grad_T[:2] < 0).all()


@pytest.mark.parametrize("head", ON_SETS, ids=name_of)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1e6])
def test_equal_rewards_and_single_responses_say_nothing(head: Head, reward: float) -> None:
    """In fp32. IRPO's relevances are not a ranking alone: equal ones weigh the same, so their gradient is 0 at the
    reference only."""
    if isinstance(head, IRPOInContext):
        x = input_from_logratios([[40.0]], [[reward]], dtype=torch.float32)
    else:
        x = input_from_logratios([[2.0, -1.0, 0.5], [40.0]], [[reward] * 3, [reward]], dtype=torch.float32)
    loss_G, grad_T = loss_and_grad(head, x)
    assert loss_G.abs().max() == 0
    assert grad_T.abs().max() == 0


@pytest.mark.parametrize("name", ["ampo", "refa"])
def test_skipped_groups_are_reported(name: str) -> None:
    head = {"ampo": AMPO(), "refa": REFA()}[name]
    x = input_from_logratios([[2.0, -1.0, 0.5], [40.0], [1.0, 0.0]], [[5.0] * 3, [5.0], [1.0, 0.0]])
    assert head(x).metrics[f"{name}/skipped"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("head", [MDPOMultisample(), MIPOMultisample()], ids=name_of)
def test_groups_that_lack_a_side_are_skipped(head: Head) -> None:
    x = input_from_logratios([[2.0, -1.0], [3.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    x = change(x, label=torch.tensor([[1, 1], [-1, 0], [0, 0], [1, -1]]))
    loss_G, grad_T = loss_and_grad(head, x)
    assert loss_G[:3].tolist() == [0, 0, 0]
    assert grad_T[:6].abs().max() == 0
    assert grad_T[6:].abs().min() > 0
    (skipped_G,) = head(x).metrics.values()
    assert skipped_G.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("head", ON_SETS, ids=name_of)
def test_sets_are_permutation_invariant(head: Head) -> None:
    """Ties included."""
    rewards = [[4.0, 1.0, 4.0, 0.0, 1.0], *REWARDS[1:]]
    x = input_from_logratios(SETS, rewards)
    y = input_from_logratios([row[::-1] for row in SETS], [row[::-1] for row in rewards])
    (loss_G, grad_T), (turned_G, turned_T) = loss_and_grad(head, x), loss_and_grad(head, y)
    assert_close(turned_G, loss_G)
    assert_close(turned_T[:5].flip(0), grad_T[:5])


@pytest.mark.parametrize("head", [*ON_SETS, MDPOMultisample(), MIPOMultisample()], ids=name_of)
def test_gradients_of_a_group_add_up_to_zero(head: Head) -> None:
    """One token each, where a mean is a sum."""
    x = change(input_from_logratios(SETS[:1], REWARDS[:1]), label=torch.tensor([[1, -1, 1, 0, -1]]))
    _, grad_T = loss_and_grad(head, x)
    assert grad_T.abs().max() > 1e-4
    assert grad_T.sum().abs() < 1e-14


@pytest.mark.parametrize("head", [PlackettLuce(), RankList(), RankList(skip=3)], ids=name_of)
def test_only_the_order_of_rewards_counts(head: Head) -> None:
    x = input_from_logratios(SETS, REWARDS)
    assert_close(loss_and_grad(head, change(x, reward=3 * x.reward_GK.exp())), loss_and_grad(head, x))


def test_irpo_weighs_as_dcg_does() -> None:
    """Ranks 1, 2, 2 and 4; relevances below 0 count as 0, and none leaves the finite numbers."""
    x = input_from_logratios([[0.0] * 4], [[3.0, 2.0, 2.0, -5.0]])
    weights = [7.0, 3 / math.log2(3), 3 / math.log2(3), 0.0]
    assert IRPOInContext()(x).metrics["irpo_incontext/weight"].item() == pytest.approx(sum(weights) / 4)
    assert IRPOInContext()(x).loss.item() == pytest.approx(math.log(2) * sum(weights) / 4)
    assert IRPOInContext()(change(x, reward=1e8 * x.reward_GK)).loss.isfinite().all()


def degree_input(K: int = 3) -> HeadInput:
    return random_input(SPODegree(gamma=0.5), [[2, 1, 3][:K]] * 4)


def test_spo_degree_without_its_term_is_multisample_dpo() -> None:
    same(SPODegree(beta=0.3, gamma=0.0), MDPOMultisample(beta=0.3), degree_input())
    same(SPODegree(beta=0.3, gamma=0.0), DPO(beta=0.3), degree_input(K=2))


def test_spo_degree_tells_degrees() -> None:
    """Gates that say the degree aloud: accuracy 1 and loss near 0; others: accuracy 0. Chance is log(classes)."""
    x = change(degree_input(), label=torch.tensor([[1, -1, 0]] * 4))
    x = change(x, columns={"removed": torch.full((4,), 2.0, dtype=F64)})
    degree_T = torch.where(x.seg.slot_T % 3 == 2, 2, 0)
    head = SPODegree(beta=0.3, gamma=1.0)

    def told(shift: int, scale: float) -> tuple[Tensor, Tensor]:
        gates = {f"degree_{c}": scale * (degree_T == (c + shift) % 4).double() for c in range(4)}
        out = head(change(x, gates=gates))
        return out.loss - MDPOMultisample(beta=0.3)(x).loss, out.metrics["spo_degree/accuracy"]

    assert_close(told(0, 50.0), (torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)), rtol=0, atol=1e-12)
    assert told(1, 50.0)[1].tolist() == [0, 0, 0, 0]
    assert_close(told(0, 0.0)[0], torch.full((4,), math.log(4), dtype=F64))


def test_prob_sft_between_nll_and_probability() -> None:
    """alpha = 0 is sft, alpha -> 0 tends to it; alpha = 1 has the gradient of p (detached) * NLL."""
    x = random_input(ProbSFT())
    same(ProbSFT(alpha=0.0), SFT(), x)
    assert_close(loss_and_grad(ProbSFT(alpha=1e-9), x), loss_and_grad(SFT(), x), rtol=1e-6, atol=1e-7)
    _, grad_T = loss_and_grad(ProbSFT(), x)
    _, nll_T = loss_and_grad(SFT(), x)
    assert_close(grad_T, nll_T * x.policy_T.detach().exp())


def test_thresholded_prob_sft_that_keeps_all_is_prob_sft() -> None:
    x = random_input(ProbSFT())
    for alpha in (0.0, 1.0):
        (kept, kept_T), (loss, grad_T) = (
            loss_and_grad(head, x) for head in (ProbSFTThreshold(alpha=alpha, threshold=1e-12), ProbSFT(alpha=alpha))
        )
        best_T = x.seg.spread(x.best_GK)
        assert_close(kept_T, grad_T)
        assert_close(kept[best_T], loss[best_T])


def test_thresholded_prob_sft_that_keeps_nothing_is_zero() -> None:
    """The authors' code divides 0 by 0."""
    x = random_input(ProbSFT())
    loss_T, grad_T = loss_and_grad(ProbSFTThreshold(threshold=1e-9, keep="bottom"), x)
    assert loss_T.abs().max() == grad_T.abs().max() == 0

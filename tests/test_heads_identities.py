"""What the heads say of one another, and where they converge when the policy is a table."""

from __future__ import annotations

import math

import pytest
import torch
from heads_support import F64, change, grid, input_from_logratios, loss_and_grad, name_of, random_input, segments
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.heads.apo_zero import APOZero
from po.heads.dpo import DPO
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.mpo_multi import MPOMulti
from po.heads.nca import NCA
from po.numeric import masked_center, masked_softmax
from po.types import Head, HeadInput

ONE_HOT = 1e6  # alpha at which no second response keeps a label
PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]
SETS = [[0.5, -0.5, 0.25, -1.0, 2.0], [1.5, -0.25], [0.0, 3.0, -2.0]]
REWARDS = [[8.0, 6.5, 7.0, 2.0, 5.0], [1.0, 4.0], [0.3, 0.2, -0.1]]


def same(a: Head, b: Head, x: HeadInput) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "head",
    [InfoNCA(beta=0.3, alpha=ONE_HOT), MPOMulti(beta=0.3, power=0), MPOMulti(beta=0.3, power=0, alpha=7.0)],
    ids=name_of,
)
def test_two_responses_and_one_best_is_dpo(head: Head) -> None:
    """InfoNCA one-hot == DPO; MPO W-0 == DPO, whatever alpha."""
    same(head, DPO(beta=0.3), input_from_logratios(PAIRS, [[1.0, 0.0]] * 4))


@pytest.mark.parametrize("e", [0.01, 0.1, 0.4])
def test_infonca_with_two_soft_labels_is_cdpo(e: float) -> None:
    """softmax of (log(1 - e), log e) is (1 - e, e)."""
    x = input_from_logratios(PAIRS, [[math.log(1 - e), math.log(e)]] * 4)
    same(InfoNCA(beta=0.3, alpha=1.0), DPO(beta=0.3, label_smoothing=e), x)


def test_signed_mpo_of_two_is_dpo_with_a_margin() -> None:
    """W-1 signed: -log s(beta h + alpha (D_w - D_l)), and D_w - D_l = R_w - R_l."""
    x = input_from_logratios(PAIRS, [[2.0, 0.5], [1.0, 0.0], [7.0, -1.0], [0.1, 0.0]])
    loss_G, _ = loss_and_grad(MPOMulti(beta=0.3, alpha=0.4, power=1, signed=True), x)
    margin_G = 0.3 * (x.logratio_GK[:, 0] - x.logratio_GK[:, 1]) + 0.4 * (x.reward_GK[:, 0] - x.reward_GK[:, 1])
    assert_close(loss_G, -logsigmoid(margin_G.detach()))


def test_abs_mpo_of_two_is_dpo() -> None:
    """Both responses deviate alike, so unsigned weights cancel."""
    same(MPOMulti(beta=0.3, power=2), DPO(beta=0.3), input_from_logratios(PAIRS, [[2.0, 0.5]] * 4))


def test_mpo_with_one_positive_is_infonca_one_hot() -> None:
    x = input_from_logratios(SETS, [[9.0, 1.0, 2.0, 1.5, 0.0], [1.0, 0.0], [-1.0, -9.0, -8.0]])
    same(MPOMulti(beta=0.3, power=0), InfoNCA(beta=0.3, alpha=ONE_HOT), x)


def test_nca_of_two_with_one_best_is_nca_pair() -> None:
    """-log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l)."""
    x = input_from_logratios(PAIRS, [[1.0, 0.0]] * 4)
    loss_G, _ = loss_and_grad(NCA(beta=0.3, alpha=ONE_HOT), x)
    w_G, l_G = (0.3 * x.logratio_GK.detach()).unbind(-1)
    assert_close(loss_G, -logsigmoid(w_G) - logsigmoid(-w_G) / 2 - logsigmoid(-l_G) / 2)


@pytest.mark.parametrize("power", [0, 2])
def test_the_sign_of_a_deviation_is_lost_in_even_powers(power: int) -> None:
    x = input_from_logratios(SETS, REWARDS)
    same(MPOMulti(power=power, signed=True), MPOMulti(power=power), x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "head", [InfoNCA(), MPOMulti(), MPOMulti(power=0), MPOMulti(power=2), MPOMulti(signed=True)], ids=name_of
)
def test_gradients_of_the_softmax_family_add_up_to_zero(head: Head) -> None:
    _, grad_T = loss_and_grad(head, input_from_logratios(SETS, REWARDS))
    assert grad_T.abs().max() > 1e-4
    assert grad_T[:5].sum().abs() < 1e-16


@pytest.mark.parametrize("head", [NCA(beta=0.3), APOZero(beta=0.3)], ids=name_of)
def test_gradients_of_heads_that_pin_the_level_do_not(head: Head) -> None:
    _, grad_T = loss_and_grad(head, input_from_logratios(PAIRS, [[1.0, 0.0]] * 4))
    assert grad_T[:2].sum().abs() > 1e-4


@pytest.mark.parametrize(
    "head", [InfoNCA(), NCA(), MPOMulti(), MPOMulti(power=0), MPOMulti(power=2), MPOMulti(signed=True)], ids=name_of
)
def test_sets_are_permutation_invariant(head: Head) -> None:
    x = input_from_logratios(SETS, REWARDS)
    y = input_from_logratios([row[::-1] for row in SETS], [row[::-1] for row in REWARDS])
    (loss_G, grad_T), (turned_G, turned_T) = loss_and_grad(head, x), loss_and_grad(head, y)
    assert_close(turned_G, loss_G)
    assert_close(turned_T[:5].flip(0), grad_T[:5])


@pytest.mark.parametrize("head", [InfoNCA(), NCA(), MPOMulti(), MPOMulti(power=2), MPOMulti(signed=True)], ids=name_of)
def test_rewards_count_up_to_a_constant(head: Head) -> None:
    x = input_from_logratios(SETS, REWARDS)
    assert_close(loss_and_grad(head, change(x, reward=x.reward_GK + 1000)), loss_and_grad(head, x))


def test_optima_have_no_gradient() -> None:
    """InfoNCA at log pi/ref = (alpha/beta) R + const; NCA at beta log pi/ref = log(K p)."""
    x = input_from_logratios(SETS, REWARDS)
    _, grad_T = loss_and_grad(InfoNCA(beta=0.5, alpha=0.7), at_logratios(x, 0.7 / 0.5 * x.reward_GK + 3.0))
    assert grad_T.abs().max() < 1e-16
    level_GK = (masked_softmax(x.reward_GK, x.seg.valid_GK, 0.7) * x.seg.valid_GK.sum(-1, keepdim=True)).log()
    _, grad_T = loss_and_grad(NCA(beta=0.5, alpha=0.7), at_logratios(x, level_GK / 0.5))
    assert grad_T.abs().max() < 1e-16


def at_logratios(x: HeadInput, logratio_GK: Tensor) -> HeadInput:
    return change(x, policy_T=x.ref_T + x.seg.spread(logratio_GK))


def test_infonca_reports_how_far_from_its_optimum_it_is() -> None:
    x = input_from_logratios(SETS, REWARDS)
    away, there = (InfoNCA(beta=0.5, alpha=0.7)(v).metrics for v in (x, at_logratios(x, 0.7 / 0.5 * x.reward_GK)))
    assert_close(there["infonca/kl"], torch.zeros(3, dtype=F64))
    assert (away["infonca/kl"] > 0.01).all()
    p_K = torch.tensor(REWARDS[1], dtype=F64).mul(0.7).softmax(-1)
    assert_close(there["infonca/label_entropy"][1], -(p_K * p_K.log()).sum())


@pytest.mark.parametrize("head", [MPOMulti(), MPOMulti(power=0), MPOMulti(power=2), MPOMulti(signed=True)], ids=name_of)
@pytest.mark.parametrize("reward", [0.0, 0.1, -7.3, 1e6])
def test_mpo_skips_sets_without_a_positive(head: MPOMulti, reward: float) -> None:
    """Equal rewards and single responses: loss and gradient exactly 0, in fp32, and reported."""
    x = input_from_logratios(
        [[2.0, -1.0, 0.5], [40.0], [1.0, 0.0]], [[reward] * 3, [reward], [1.0, 0.0]], dtype=torch.float32
    )
    loss_G, grad_T = loss_and_grad(head, x)
    assert loss_G[:2].tolist() == [0, 0]
    assert loss_G[2] > 0
    assert grad_T[:4].tolist() == [0, 0, 0, 0]
    metrics = head(x).metrics
    assert metrics["mpo_multi/skipped"].tolist() == [1, 1, 0]
    assert metrics["mpo_multi/positives"].tolist() == [0, 0, 1]


def test_a_group_of_one_response() -> None:
    """InfoNCA has nothing to say; NCA holds it at its reference likelihood."""
    x = input_from_logratios([[2.0], [0.0]], [[3.0], [3.0]])
    loss_G, grad_T = loss_and_grad(InfoNCA(beta=0.5), x)
    assert loss_G.tolist() == grad_T.tolist() == [0, 0]
    _, grad_T = loss_and_grad(NCA(beta=0.5), x)
    assert grad_T[0] > 0.1
    assert grad_T[1] == 0


def test_tied_best_responses_share_the_label() -> None:
    x = input_from_logratios([[0.0, 0.0, 0.0]], [[2.0, 2.0, 1.0]])
    _, grad_T = loss_and_grad(InfoNCA(beta=1.0, alpha=ONE_HOT), x)
    assert_close(grad_T, torch.tensor([1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3], dtype=F64))


@pytest.mark.parametrize("head", [InfoNCA(alpha=1e38), NCA(alpha=1e38)], ids=name_of)
def test_an_overflowing_alpha_is_one_hot(head: Head) -> None:
    """alpha * R is infinite in fp32; the label is the one-hot all the same."""
    x = input_from_logratios([[0.5, -0.5, 0.25]], [[8.0, 6.5, 80.0]], dtype=torch.float32)
    hot = type(head)(alpha=100.0)  # type: ignore[call-arg]
    assert_close(loss_and_grad(head, x), loss_and_grad(hot, x))


def test_masked_center_is_exact_where_a_mean_is_not() -> None:
    """0.1 + 0.1 + 0.1 is not 0.3 in fp32: the plain mean of equal numbers may lie beside them."""
    x = torch.tensor([[0.1, 0.1, 0.1, math.nan], [1.0, 2.0, 6.0, math.nan]])
    where = torch.tensor([[True, True, True, False]] * 2)
    assert masked_center(x, where).tolist() == [[0, 0, 0, 0], [-2, -1, 3, 0]]


def fit(head: Head, reward: list[list[float]] | None, K: int) -> Tensor:
    """Log-ratios (G, K) where a tabular softmax policy over K + 1 answers, K of them in the data, stops learning."""
    G = 1 if reward is None else len(reward)
    start_GV = random_input(DPO.needs, [[1] * (K + 1)] * G, seed=5).policy_T.detach().view(G, K + 1) / 3
    start_GV[:, :K] -= 4  # leaves room: the answers of the data may rise without filling the simplex
    ref_GV = start_GV.log_softmax(-1)
    theta_GV = start_GV.clone().requires_grad_(True)
    seg = segments([[1] * K] * G)
    optimizer = torch.optim.LBFGS(
        [theta_GV], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def view() -> HeadInput:
        policy_T = theta_GV.log_softmax(-1)[:, :K].flatten()
        scores = None if reward is None else grid(reward)
        return HeadInput(seg, policy_T, ref=ref_GV[:, :K].flatten(), reward=scores)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = head(view()).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return view().logratio_GK.detach()


def test_infonca_converges_to_scaled_rewards() -> None:
    reward = [[1.0, 0.2, -0.5], [0.0, 0.4, 0.9]]
    gap_GK = fit(InfoNCA(beta=0.8, alpha=0.6), reward, 3) - 0.6 / 0.8 * grid(reward)
    assert_close(gap_GK, gap_GK[:, :1].expand(-1, 3), rtol=0, atol=1e-5)


def test_nca_converges_to_a_level() -> None:
    reward = [[1.0, 0.2, -0.5], [0.0, 0.4, 0.9]]
    r_GK = 0.8 * fit(NCA(beta=0.8, alpha=0.6), reward, 3)
    assert_close(r_GK, (3 * (0.6 * grid(reward)).softmax(-1)).log(), rtol=0, atol=1e-5)


def test_ipo_converges_to_its_target() -> None:
    better, worse = fit(IPO(tau=0.4), None, 2)[0]
    assert better - worse == pytest.approx(1 / (2 * 0.4), abs=1e-5)


def test_conservative_dpo_converges_to_the_log_odds_of_its_labels() -> None:
    better, worse = fit(DPO(beta=0.5, label_smoothing=0.1), None, 2)[0]
    assert 0.5 * (better - worse) == pytest.approx(math.log(0.9 / 0.1), abs=1e-5)

"""What DPO's relatives on pairs have in common with DPO and with one another. Weights: test_identities_weighted.py."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from heads_support import change, input_from_logratios, loss_and_grad, name_of, random_input
from pairs_support import EVERYTHING, column, pairs, same
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.heads.bvpo import BVPO
from po.heads.cream import CREAM
from po.heads.dpo import DPO
from po.heads.dpo_norm import DPONorm
from po.heads.dpop import DPOP
from po.heads.exo_pref import EXOPref
from po.heads.exo_rw import EXORw
from po.heads.fdpo import FDPO
from po.heads.hinge import Hinge
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.ld_dpo import LDDPO
from po.heads.rdpo import RDPO
from po.heads.sem_dpo import SemDPO
from po.heads.sppo_hard import SPPOHard
from po.heads.wpo import WPO
from po.types import Head, HeadInput

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]
FLIPPED = [row[::-1] for row in PAIRS]
SETS = [[0.5, -0.5, 0.25, -1.0, 2.0], [1.5, -0.25], [0.0, 3.0, -2.0]]
REWARDS = [[8.0, 6.5, 7.0, 2.0, 5.0], [1.0, 4.0], [0.3, 0.2, -0.1]]


def no_collision() -> HeadInput:
    """Collision equal to log pi: every weight is 1, as for a policy that is uniform."""
    x = pairs()
    return change(x, collision=x.policy_T.detach())


IS_DPO: list[tuple[Head, HeadInput]] = [
    (RDPO(epsilon=0.0), pairs()),
    (FDPO(divergence="reverse_kl"), pairs()),
    (FDPO(divergence="reverse_kl", alpha=0.9), pairs()),
    (LDDPO(alpha=1.0), pairs()),
    (LDDPO(alpha=0.3), random_input(EVERYTHING, [[3, 3], [1, 1], [6, 6]])),
    (DPOP(beta=0.1, lam=0.0), pairs()),
    (DPOP(beta=0.1, lam=7.0), input_from_logratios([[0.5, -0.75], [2.0, 9.0]])),
    (WPO(beta=0.1), no_collision()),
    (WPO(beta=0.1, clamp=True), no_collision()),
    (CREAM(), column("consistency", 1.0)),
    (SemDPO(alpha=0.0), pairs()),
    (BVPO(alpha=1.0), column("thinking", 1.0)),
    (BVPO(alpha=0.0), column("thinking", 0.0)),
]


@pytest.mark.parametrize(("head", "x"), IS_DPO, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
def test_where_it_is_dpo(head: Head, x: HeadInput) -> None:
    same(head, DPO(beta=0.1), x)


@pytest.mark.parametrize("e", [0.01, 0.3])
def test_robust_dpo_is_dpo_less_its_flip(e: float) -> None:
    """rDPO (1 - 2 e) = (1 - e) DPO - e DPO of the flipped pair."""
    (loss_G, _), (flip_G, _) = (loss_and_grad(DPO(beta=0.3), input_from_logratios(v)) for v in (PAIRS, FLIPPED))
    robust_G, _ = loss_and_grad(RDPO(beta=0.3, epsilon=e), input_from_logratios(PAIRS))
    assert_close(robust_G * (1 - 2 * e), (1 - e) * loss_G - e * flip_G)


def test_robust_dpo_is_unbiased_under_flips_and_cdpo_is_not() -> None:
    """The mean over a label and its flip is DPO's loss on the true label."""
    truth_G, _ = loss_and_grad(DPO(beta=0.3), input_from_logratios(PAIRS))

    def under_flips(head: Head) -> Tensor:
        right_G, wrong_G = (loss_and_grad(head, input_from_logratios(v))[0] for v in (PAIRS, FLIPPED))
        return 0.8 * right_G + 0.2 * wrong_G

    assert_close(under_flips(RDPO(beta=0.3, epsilon=0.2)), truth_G)
    assert (under_flips(DPO(beta=0.3, label_smoothing=0.2)) - truth_G).abs().max() > 0.1


def test_robust_dpo_is_unbounded_below() -> None:
    """With slope -b e / (1 - 2 e)."""
    loss_G, grad_T = loss_and_grad(RDPO(beta=0.1, epsilon=0.2), input_from_logratios([[5000.0, -5000.0]]))
    assert loss_G.item() == pytest.approx(-1000 * 0.2 / 0.6)
    assert grad_T.tolist() == pytest.approx([-0.1 * 0.2 / 0.6, 0.1 * 0.2 / 0.6])


def test_the_alpha_divergence_joins_reverse_and_forward_kl() -> None:
    x = input_from_logratios(PAIRS)
    same(FDPO(beta=0.3, divergence="alpha", alpha=1e-9), DPO(beta=0.3), x, rtol=1e-6, atol=1e-9)
    forward = FDPO(beta=0.3, divergence="forward_kl")
    same(FDPO(beta=0.3, divergence="alpha", alpha=1 - 1e-12), forward, x, rtol=1e-9, atol=1e-9)


def test_alpha_is_one_minus_trl_s() -> None:
    """TRL's f' = (u^(a - 1) - 1) / (a - 1), whose a is 1 minus ours."""
    x, a = input_from_logratios(PAIRS), 0.7
    u_GK = x.logratio_GK.detach().exp()
    w_G, l_G = ((u_GK ** (a - 1) - 1) / (a - 1)).unbind(-1)
    loss_G, _ = loss_and_grad(FDPO(beta=0.3, divergence="alpha", alpha=1 - a), x)
    assert_close(loss_G, -logsigmoid(0.3 * (w_G - l_G)))


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha", "reverse_kl"])
def test_every_divergence_is_finite_at_the_extremes(
    divergence: Literal["forward_kl", "js", "alpha", "reverse_kl"], alpha: float
) -> None:
    """fp32; even the squared gradient, of which the norm is made."""
    ends = [-1000.0, -90.0, 0.0, 90.0, 1000.0]
    x = input_from_logratios([[a, b] for a in ends for b in ends], dtype=torch.float32)
    loss_G, grad_T = loss_and_grad(FDPO(beta=1.0, divergence=divergence, alpha=alpha), x)
    assert loss_G.isfinite().all()
    assert grad_T.square().sum().isfinite()


def test_the_cap_ends_one_response_s_gradient_and_is_reported() -> None:
    head = FDPO(beta=0.1, divergence="alpha", alpha=0.5)
    x = input_from_logratios([[-59.0, -1.0], [-61.0, -1.0]])
    assert head(x).metrics["fdpo/capped"].tolist() == [[0, 0], [1, 0]]
    _, grad_T = loss_and_grad(head, x)
    assert (grad_T != 0).tolist() == [True, True, False, True]


def test_length_normalised_dpo_of_equal_lengths_is_dpo() -> None:
    same(DPONorm(beta=2.0), DPO(beta=0.5), input_from_logratios(PAIRS, lengths=[[4, 4]] * 4))


def test_ld_dpo_without_tail_is_dpo_on_cut_responses() -> None:
    """alpha = 0: what lies behind the shorter response's length does not count."""
    whole = pairs()
    owner = whole.seg.slot_T.tolist()
    place = [owner[:t].count(s) for t, s in enumerate(owner)]
    keep_T = torch.tensor([p < min(owner.count(s), owner.count(s ^ 1)) for p, s in zip(place, owner, strict=True)])
    assert not keep_T.all()
    cut = HeadInput(
        replace(whole.seg, slot_T=whole.seg.slot_T[keep_T]), whole.policy_T.detach()[keep_T], ref=whole.ref_T[keep_T]
    )
    (loss_G, grad_T), (cut_G, cut_T) = loss_and_grad(LDDPO(alpha=0.0), whole), loss_and_grad(DPO(beta=0.1), cut)
    assert_close(loss_G, cut_G)
    assert_close(grad_T[keep_T], cut_T)
    assert grad_T[~keep_T].abs().max() == 0
    assert_close(LDDPO()(whole).metrics["ld_dpo/tail"], (~keep_T).double())


def test_the_guide_s_example_is_the_head() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "add-a-head.md").read_text(encoding="utf-8")
    file = Path(__file__).parents[1] / "po" / "heads" / "hinge.py"
    assert re.findall(r"```python\n(.*?)```", guide, re.S)[0] == file.read_text(encoding="utf-8")


def test_hinge_has_no_gradient_beyond_its_margin() -> None:
    _, grad_T = loss_and_grad(Hinge(beta=0.1), input_from_logratios([[6.0, -3.9], [6.0, -4.0], [6.0, -4.1]]))
    assert grad_T.tolist() == pytest.approx([-0.1 / 3, 0.1 / 3, 0, 0, 0, 0])


def test_sppo_is_ipo_with_its_level_pinned() -> None:
    """(a - c)^2 + (b + c)^2 = ((a - b - 2 c)^2 + (a + b)^2) / 2, and 2 c = 1 / beta is IPO's 1 / (2 tau)."""
    x = input_from_logratios(PAIRS)
    ipo_G, _ = loss_and_grad(IPO(tau=0.15), x)
    sppo_G, _ = loss_and_grad(SPPOHard(beta=0.3), x)
    assert_close(sppo_G, ipo_G / 2 + x.logratio_GK.detach().sum(-1) ** 2 / 2)


def test_official_exo_labels_shift_the_loss_alone() -> None:
    """log-labels (0, -10) are e = 1 / (1 + e^10) less log(1 + e^-10)."""
    x, e = input_from_logratios(PAIRS), 1 / (1 + math.exp(10))
    (loss_G, grad_T), (official_G, official_T) = (
        loss_and_grad(EXOPref(beta_pi=0.3, epsilon=e, labels=labels), x) for labels in ("smoothed", "official")
    )
    assert_close(official_T, grad_T)
    assert_close(official_G, loss_G - math.log1p(math.exp(-10)))


def test_exo_of_two_scored_responses_is_exo_on_the_pair() -> None:
    """softmax of (log(1 - e), log e) is (1 - e, e)."""
    e, c = 0.05, 0.7
    x = input_from_logratios(PAIRS, [[c * math.log(1 - e), c * math.log(e)]] * 4)
    same(EXORw(beta_pi=0.3, beta_r=c), EXOPref(beta_pi=0.3, epsilon=e), x)


def test_exo_and_infonca_are_the_two_directions_of_one_divergence() -> None:
    """With log-ratios and rewards in each other's place; InfoNCA adds the entropy of its labels."""
    exo_G, _ = loss_and_grad(EXORw(beta_pi=0.4, beta_r=1 / 0.7), input_from_logratios(SETS, REWARDS))
    swapped = input_from_logratios(REWARDS, SETS)
    assert_close(exo_G, InfoNCA(beta=0.7, alpha=0.4)(swapped).metrics["infonca/kl"])


OPTIMA: list[tuple[Head, list[list[float]], list[list[float]] | None]] = [
    (SPPOHard(beta=0.1), [[5.0, -5.0]], None),
    (EXOPref(beta_pi=0.5, epsilon=0.1), [[2 * math.log(9), 0.0]], None),
    (EXOPref(beta_pi=0.5, labels="official"), [[13.0, -7.0]], None),
    (EXORw(beta_pi=0.5, beta_r=0.8), [[r / (0.5 * 0.8) - 3 for r in row] for row in REWARDS], REWARDS),
    (InfoNCA(beta=0.5, alpha=1 / 0.8), [[r / (0.5 * 0.8) - 3 for r in row] for row in REWARDS], REWARDS),
]


@pytest.mark.parametrize(("head", "logratio", "reward"), OPTIMA, ids=lambda v: str(v)[:40])
def test_optima_have_no_gradient(head: Head, logratio: list[list[float]], reward: list[list[float]] | None) -> None:
    _, grad_T = loss_and_grad(head, input_from_logratios(logratio, reward))
    assert grad_T.abs().max() < 1e-13
    _, grad_T = loss_and_grad(head, input_from_logratios([[v / 2 for v in row] for row in logratio], reward))
    assert grad_T.abs().max() > 1e-5


def test_exo_on_a_set() -> None:
    """Gradients add up to zero, order and a constant of the rewards do not matter, one response has nothing to say."""
    head, x = EXORw(beta_r=2.0), input_from_logratios(SETS, REWARDS)
    (loss_G, grad_T) = loss_and_grad(head, x)
    assert grad_T[:5].abs().max() > 1e-4
    assert grad_T[:5].sum().abs() < 1e-15
    assert_close(loss_and_grad(head, change(x, reward=x.reward_GK + 1000)), (loss_G, grad_T))
    y = input_from_logratios([row[::-1] for row in SETS], [row[::-1] for row in REWARDS])
    turned_G, turned_T = loss_and_grad(head, y)
    assert_close(turned_G, loss_G)
    assert_close(turned_T[:5].flip(0), grad_T[:5])
    loss_G, grad_T = loss_and_grad(head, input_from_logratios([[7.0]], [[3.0]]))
    assert loss_G.tolist() == grad_T.tolist() == [0]

"""What the heads for labelled, unlabelled and scored responses say of one another and of DPO, and their optima."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from po.heads.apo_zero import APOZero
from po.heads.apo_zero_unpaired import APOZeroUnpaired
from po.heads.bco import BCO
from po.heads.bco_matched import BCOMatched
from po.heads.d2o import D2O
from po.heads.dpo import DPO
from po.heads.dro_v import DROV
from po.heads.hypo_kl import HyPOKL
from po.heads.kto import KTO
from po.heads.npo import NPO
from po.heads.npo_kl import NPOKL
from po.heads.npo_nll import NPONLL
from po.heads.pmpo import PMPO
from po.heads.selm import SELM
from po.types import Head, HeadInput

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [30.0, -4.0]]


def same(a: Head, b: Head, x: HeadInput, y: HeadInput | None = None) -> None:
    assert_close(loss_and_grad(a, x), loss_and_grad(b, y or x), rtol=1e-12, atol=1e-14)


def as_rows() -> HeadInput:
    """Each response of PAIRS as a row of its own, in the order of the pairs."""
    x = input_from_logratios([[v] for pair in PAIRS for v in pair])
    return change(x, label=torch.tensor([[1], [-1]] * 4))


def as_groups() -> HeadInput:
    return change(input_from_logratios(PAIRS), label=torch.tensor([[1, -1]] * 4))


def test_kto_without_drift_is_apo_zero_unpaired() -> None:
    """z0 is 0 where the mismatched log-ratios are below 0 on average."""
    x = change(as_rows(), mismatch=-torch.arange(8.0, dtype=F64))
    fields = {"beta": 0.3, "lambda_d": 0.5, "lambda_u": 1.5}
    same(KTO(**fields), APOZeroUnpaired(**fields), x)  # type: ignore[arg-type]


def test_kto_is_apo_zero_around_z0() -> None:
    """A drift moves every log-ratio."""
    x = change(as_rows(), mismatch=torch.full((8,), 0.7, dtype=F64))
    assert x.ref is not None
    same(KTO(beta=0.3), APOZeroUnpaired(beta=0.3), x, change(x, ref=x.ref + 0.7))


def test_two_rows_of_apo_zero_unpaired_are_a_pair_of_apo_zero() -> None:
    rows, grad_T = loss_and_grad(APOZeroUnpaired(beta=0.3), as_rows())
    pairs_G, pair_grad_T = loss_and_grad(APOZero(beta=0.3), input_from_logratios(PAIRS))
    assert_close(rows.view(4, 2).sum(-1), pairs_G)
    assert_close(2 * grad_T, pair_grad_T)


@pytest.mark.parametrize("delta", [-0.4, 0.0, 0.02, 1.5])
def test_bco_is_dpo_and_an_excess(delta: float) -> None:
    """BCE - DPO = log1p((e^-x + e^-y) / (1 + e^-(x + y))) > 0 for x = r_w - d, y = d - r_l."""
    state = {"mean": torch.full((2,), delta, dtype=F64), "rows": torch.full((2,), 1e14, dtype=F64)}
    rows = BCO(beta=0.3, shift="trl")(change(as_rows(), state=state)).loss.view(4, 2)
    x_G, y_G = (0.3 * torch.tensor(PAIRS, dtype=F64) - delta).mul(torch.tensor([1, -1])).unbind(-1)
    excess_G = torch.log1p(((-x_G).exp() + (-y_G).exp()) / (1 + (-x_G - y_G).exp()))
    assert (excess_G > 0).all()
    assert_close(rows.sum(-1) - DPO(beta=0.3)(input_from_logratios(PAIRS)).loss, excess_G, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shift", ["paper", "trl"])
def test_bco_matched_with_equal_densities_is_bco(shift: str) -> None:
    x = change(as_rows(), state={"mean": torch.zeros(2, dtype=F64), "rows": torch.zeros(2, dtype=F64)})
    y = change(x, columns={"density_ratio": torch.ones(8, dtype=F64)})
    same(BCO(shift=shift), BCOMatched(shift=shift), x, y)  # type: ignore[arg-type]


def test_bco_s_shifts_differ_where_labels_are_unbalanced() -> None:
    """The paper's is the middle of the two means, TRL's leans to the side with more rows."""
    x = input_from_logratios([[1.0], [1.0], [1.0], [-3.0]])
    x = change(x, label=torch.tensor([[1], [1], [1], [-1]]))
    x = change(x, state={"mean": torch.zeros(2, dtype=F64), "rows": torch.zeros(2, dtype=F64)})
    paper, trl = (BCO(beta=1.0, shift=s)(x).metrics["bco/delta"][0].item() for s in ("paper", "trl"))  # type: ignore[arg-type]
    assert (paper, trl) == (-1.0, 0.0)


def test_npo_is_dpo_without_the_chosen_side() -> None:
    x = input_from_logratios([[0.0, v] for _, v in PAIRS])
    y = change(input_from_logratios([[v] for _, v in PAIRS]), label=torch.full((4, 1), -1))
    (pairs_G, pair_grad_T), (rows, grad_T) = loss_and_grad(DPO(beta=0.3), x), loss_and_grad(NPO(beta=0.3), y)
    assert_close(rows.squeeze(-1), pairs_G * 2 / 0.3)
    assert_close(grad_T, pair_grad_T[1::2] * 2 / 0.3)


def test_npo_with_a_small_beta_is_gradient_ascent() -> None:
    x = change(input_from_logratios([[v] for _, v in PAIRS]), label=torch.full((4, 1), -1))
    _, grad_T = loss_and_grad(NPO(beta=1e-8), x)
    assert_close(grad_T, torch.full((4,), 1 / 4, dtype=F64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("head", [NPONLL(beta=0.3), NPOKL(beta=0.3)], ids=name_of)
def test_npo_s_retain_terms_leave_what_is_to_forget(head: Head) -> None:
    x = random_input(head, [[2], [3], [1]])
    forget = change(x, label=torch.full((3, 1), -1))
    same(head, NPO(beta=0.3), forget)
    retain = change(x, label=torch.ones(3, 1, dtype=torch.int64))
    loss, _ = loss_and_grad(head, retain)
    assert_close(loss, x.seg.mean(-x.policy_T.detach() if isinstance(head, NPONLL) else x.token_kl_T))


@pytest.mark.parametrize(
    "head",
    [D2O(alpha=0.3, beta=0.3), SELM(alpha=0.0, beta=0.3), SELM(alpha=0.7, beta=0.3), HyPOKL(lam=0.0, beta=0.3)],
    ids=name_of,
)
def test_a_good_and_a_bad_response_are_dpo(head: Head) -> None:
    same(head, DPO(beta=0.3), as_groups(), input_from_logratios(PAIRS))


@pytest.mark.parametrize("head", [SELM(alpha=0.0), HyPOKL(lam=0.0)], ids=name_of)
def test_without_weight_the_unlabelled_do_not_count(head: Head) -> None:
    """And in a prompt without a pair nothing does."""
    x = input_from_logratios([[0.5, -0.75, 3.0], [1.0, 2.0, 3.0]])
    loss_G, grad_T = loss_and_grad(head, change(x, label=torch.tensor([[1, -1, 0], [0, 0, 1]])))
    pair_G, pair_grad_T = loss_and_grad(DPO(beta=head.beta), input_from_logratios([[0.5, -0.75]]))  # type: ignore[attr-defined]
    assert_close(loss_G, torch.cat([pair_G, torch.zeros(1, dtype=F64)]))
    assert_close(grad_T, torch.cat([pair_grad_T / 2, torch.zeros(4, dtype=F64)]))


def test_d2o_of_several_samples_is_dpo_against_their_mean() -> None:
    x = change(input_from_logratios([[1.0, 2.0, 6.0, -0.5]]), label=torch.tensor([[1, 1, 1, -1]]))
    loss_G, _ = loss_and_grad(D2O(alpha=0.2, beta=0.2), x)
    assert_close(loss_G, loss_and_grad(DPO(beta=0.2), input_from_logratios([[3.0, -0.5]]))[0])


def test_pmpo_of_accepted_responses_is_likelihood() -> None:
    """alpha = 1, beta = 0; and of rejected ones alone it is gradient ascent."""
    x = random_input(PMPO(), [[2, 3, 1], [4, 1, 1]])
    x = change(x, label=torch.tensor([[1, 1, -1], [1, 1, 0]]))
    loss_G, grad_T = loss_and_grad(PMPO(alpha=1.0, beta=0.0), x)
    logp_GK = x.seg.sum(x.policy_T.detach())
    assert_close(loss_G, -logp_GK[:, :2].mean(-1))
    assert_close(grad_T, -x.seg.spread((x.label_GK > 0).double() / 4))
    _, grad_T = loss_and_grad(PMPO(alpha=0.0, beta=0.0), x)
    assert_close(grad_T, x.seg.spread((x.label_GK < 0).double() / 2))


def vocabulary(theta_V: Tensor, ref_V: Tensor, draws: list[tuple[int, ...]]) -> HeadInput:
    """One group per draw of one-token responses, all sampled."""
    x = input_from_logratios([[0.0] * len(d) for d in draws])
    tokens = torch.tensor(list(itertools.chain(*draws)))
    zero_GK = torch.zeros(x.seg.valid_GK.shape, dtype=torch.int64)
    return change(x, policy_T=theta_V.log_softmax(-1)[tokens], ref=ref_V[tokens], label=zero_GK)


@pytest.mark.parametrize("estimator", ["rloo", "reinforce"])
@pytest.mark.parametrize("k", [1, 2])
def test_hypo_s_gradient_is_that_of_the_kl(estimator: str, k: int) -> None:
    """Averaged over every possible draw of k samples from the policy."""
    rng = torch.Generator().manual_seed(0)
    theta_V = torch.randn(5, generator=rng, dtype=F64).requires_grad_(True)
    ref_V = torch.randn(5, generator=rng, dtype=F64).log_softmax(-1)
    draws = list(itertools.product(range(5), repeat=k))
    logp_V = theta_V.log_softmax(-1)
    chance_G = torch.stack([logp_V.detach()[list(d)].sum().exp() for d in draws])
    head = HyPOKL(lam=1.0, estimator=estimator)  # type: ignore[arg-type]
    surrogate = (chance_G * head(vocabulary(theta_V, ref_V, draws)).loss).sum()
    (grad_V,) = torch.autograd.grad(surrogate, theta_V)
    (exact_V,) = torch.autograd.grad((logp_V.exp() * (logp_V - ref_V)).sum(), theta_V)
    assert exact_V.abs().max() > 0.1
    assert_close(grad_V, exact_V)


def test_rloo_of_a_single_sample_has_no_baseline() -> None:
    x = change(input_from_logratios([[0.5, -0.75, 3.0]]), label=torch.tensor([[1, -1, 0]]))
    same(HyPOKL(lam=0.3, estimator="rloo"), HyPOKL(lam=0.3, estimator="reinforce"), x)


def test_selm_lowers_what_was_said() -> None:
    x = change(input_from_logratios([[0.5, -0.75, 3.0]]), label=torch.tensor([[1, -1, 0]]))
    _, grad_T = loss_and_grad(SELM(alpha=0.2, beta=0.3), x)
    assert_close(grad_T[2], torch.tensor(0.2 * 0.3, dtype=F64))


def test_dro_v_s_optimum() -> None:
    """Log-ratios of (R - V) / tau: no loss, and nothing to learn for policy or value."""
    head = DROV(tau=0.4)
    x = random_input(head, [[3, 1], [2, 5]], seed=1)
    value_T = torch.full_like(x.policy_T, 0.3).detach().requires_grad_(True)
    per_token_GK = (x.reward_GK - 0.3) / 0.4 / x.seg.length_GK
    x = change(x, policy_T=x.ref_T + x.seg.spread(per_token_GK), gates={"value": value_T})
    loss_GK, grad_T = loss_and_grad(head, x)
    assert_close(loss_GK, torch.zeros(2, 2, dtype=F64), rtol=0, atol=1e-24)
    assert grad_T.abs().max() < 1e-12
    assert torch.autograd.grad(head(x).loss.sum(), value_T)[0].abs().max() < 1e-12


@pytest.mark.parametrize("head", [KTO(beta=0.3), APOZeroUnpaired(beta=0.3), NPO(beta=0.3)], ids=name_of)
def test_these_heads_pin_the_level(head: Head) -> None:
    """Their gradients do not add up to 0, DPO's do."""
    x = change(as_rows(), mismatch=torch.full((8,), 0.2, dtype=F64))
    _, grad_T = loss_and_grad(head, x)
    assert grad_T.sum().abs() > 1e-4
    assert loss_and_grad(DPO(beta=0.3), input_from_logratios(PAIRS))[1].sum().abs() < 1e-16


def test_bco_s_shift_is_a_constant() -> None:
    """The gradient is that of the loss around the value of the shift."""
    x = change(as_rows(), state={"mean": torch.zeros(2, dtype=F64), "rows": torch.zeros(2, dtype=F64)})
    _, grad_T = loss_and_grad(BCO(beta=0.3), x)
    r_T = 0.3 * torch.tensor(PAIRS, dtype=F64).flatten()
    delta = (r_T[::2].mean() + r_T[1::2].mean()) / 2
    sign_T = torch.tensor([1.0, -1.0] * 4, dtype=F64)
    assert_close(grad_T, -sign_T * 0.3 * (-sign_T * (r_T - delta)).sigmoid() / 8)
    assert_close(BCO(beta=0.3)(x).loss.flatten(), -logsigmoid(sign_T * (r_T - delta)))


def test_npo_s_loss_at_the_reference() -> None:
    x = change(input_from_logratios([[0.0]]), label=torch.tensor([[-1]]))
    assert NPO(beta=0.1)(x).loss.item() == pytest.approx(20 * math.log(2))

"""Heads for one labelled response at a time against their papers' formulas (mpmath), and against figures that were
computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads_golden import Objective, check_objective, sigmoid, token_values
from heads_support import F64, change, loss_and_grad, name_of, random_input
from mpmath import exp, log, mpf
from torch.testing import assert_close
from unpaired_support import (
    LABELS,
    LOSE,
    LOSE_REF,
    SIZES,
    WIN,
    WIN_REF,
    Made,
    check,
    column,
    given,
    labels,
    mean,
    rows,
    sums,
)

from po.heads.apo_zero_unpaired import APOZeroUnpaired
from po.heads.bco import BCO
from po.heads.bco_matched import BCOMatched
from po.heads.kto import KTO
from po.heads.npo import NPO
from po.heads.npo_kl import NPOKL
from po.heads.npo_nll import NPONLL
from po.types import Head, HeadInput


def kto(beta: float, lambda_d: float = 1, lambda_u: float = 1, nonzero: bool = False) -> Made:
    def make(x: HeadInput) -> Objective:
        other = [mpf(m) for m in x.mismatch_G.tolist()]
        z0 = max(mpf(0), sum(other) / (sum(m != 0 for m in other) if nonzero else len(other)))

        def row(u: mpf, label: int) -> mpf:
            if label > 0:
                return lambda_d * (1 - sigmoid(beta * (u - z0)))
            return lambda_u * (1 - sigmoid(beta * (z0 - u)))

        return lambda policy: [row(u, label) for (u,), label in zip(sums(x, policy), labels(x), strict=True)]

    return make


KTO_CASES = [
    (KTO(beta=0.1), kto(0.1)),
    (KTO(beta=0.7, lambda_d=1.0, lambda_u=1.33), kto(0.7, 1.0, 1.33)),
    (KTO(beta=0.7, lambda_d=0.6), kto(0.7, 0.6)),
    (KTO(beta=0.7, estimator="nonzero"), kto(0.7, nonzero=True)),
]


@pytest.mark.parametrize(("head", "made"), KTO_CASES, ids=lambda v: name_of(v) if isinstance(v, Head) else "")
@pytest.mark.parametrize("mismatch", [[0.3, -0.1, 0.45, 0.0, 0.0, 1.5], [-0.3, 0.1, -0.4, 0.2, -1.0, 0.0]])
def test_kto(head: Head, made: Made, mismatch: list[float]) -> None:
    """z0 above 0, and clamped."""
    x = rows(head, mismatch=torch.tensor(mismatch, dtype=F64))
    check_objective(head, made(x), x)
    expected = torch.tensor(mismatch, dtype=F64)
    z0_G = head(x).metrics["kto/z0"]
    counts = (expected != 0).sum() if getattr(head, "estimator", "") == "nonzero" else 6
    assert_close(z0_G, (expected.sum() / counts).clamp(min=0).expand(6))


def by_row(desirable: Callable[[mpf], mpf], undesirable: Callable[[mpf], mpf], reference: bool = True) -> Made:
    """A loss of each response's log pi/ref."""

    def make(x: HeadInput) -> Objective:
        def losses(policy: list[mpf]) -> list[mpf]:
            rows = zip(sums(x, policy, reference), labels(x), strict=True)
            return [desirable(u) if label > 0 else undesirable(u) for (u,), label in rows]

        return losses

    return make


def forget(beta: float) -> Callable[[mpf], mpf]:
    return lambda u: 2 / mpf(beta) * log(1 + exp(beta * u))


@pytest.mark.parametrize(
    ("head", "made"),
    [
        (APOZeroUnpaired(beta=0.1), by_row(lambda u: 1 - sigmoid(mpf(0.1) * u), lambda u: sigmoid(mpf(0.1) * u))),
        (
            APOZeroUnpaired(beta=2.0, lambda_d=0.5, lambda_u=3.0),
            by_row(lambda u: (1 - sigmoid(2 * u)) / 2, lambda u: 3 * sigmoid(2 * u)),
        ),
        (NPO(beta=0.1), by_row(lambda u: mpf(0), forget(0.1))),
        (NPO(beta=2.0), by_row(lambda u: mpf(0), forget(2.0))),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_heads_of_one_response(head: Head, made: Made) -> None:
    x = rows(head)
    check_objective(head, made(x), x)


@pytest.mark.parametrize("lambda_r", [1.0, 0.3])
def test_npo_with_a_retain_term(lambda_r: float) -> None:
    nll, kl = NPONLL(beta=0.4, lambda_r=lambda_r), NPOKL(beta=0.4, lambda_r=lambda_r)
    x, y = rows(nll), rows(kl)

    def with_nll(policy: list[mpf]) -> list[mpf]:
        retain = [-mpf(lambda_r) * mean(r) for (r,) in token_values(x, policy)]
        return [b if s > 0 else forget(0.4)(u) for b, (u,), s in zip(retain, sums(x, policy), labels(x), strict=True)]

    def with_kl(policy: list[mpf]) -> list[mpf]:
        retain = [mpf(lambda_r) * mean(r) for (r,) in token_values(y, [mpf(v) for v in y.token_kl_T.tolist()])]
        return [b if s > 0 else forget(0.4)(u) for b, (u,), s in zip(retain, sums(y, policy), labels(y), strict=True)]

    check_objective(nll, with_nll, x)
    check_objective(kl, with_kl, y)


def test_the_kl_of_npo_kl_is_trained() -> None:
    head = NPOKL(beta=0.4, lambda_r=0.3)
    x = rows(head)
    kl_T = x.token_kl_T.clone().requires_grad_(True)
    (grad_T,) = torch.autograd.grad(head(change(x, token_kl=kl_T)).loss.sum(), kl_T)
    assert_close(grad_T, x.seg.spread(torch.where(LABELS > 0, 0.3 / x.seg.length_GK, 0).double()))


def shifted(x: HeadInput, delta: mpf, beta: float, weight: list[mpf] | None = None) -> Objective:
    """BCO's loss for a given shift."""

    def row(u: mpf, label: int, w: mpf) -> mpf:
        return -log(sigmoid(beta * u - delta)) if label > 0 else -w * log(sigmoid(delta - beta * u))

    weights = weight or [mpf(1)] * len(labels(x))
    return lambda policy: [row(u, s, w) for (u,), s, w in zip(sums(x, policy), labels(x), weights, strict=True)]


def class_means(x: HeadInput, beta: float) -> list[list[mpf]]:
    """Rewards of the desirable rows, and of the others."""
    r = [beta * u for (u,) in sums(x, [mpf(p) for p in x.policy_T.tolist()])]
    return [[v for v, s in zip(r, labels(x), strict=True) if s == side] for side in (1, -1)]


@pytest.mark.parametrize("cls", [BCO, BCOMatched])
@pytest.mark.parametrize("shift", ["paper", "trl"])
def test_bco_over_three_steps(cls: type[Head], shift: str) -> None:
    """The shift follows the rewards, this step's included; the third step has no undesirable rows."""
    head = cls(beta=0.4, shift=shift, ema=0.7)  # type: ignore[call-arg]
    ratio = [0.2, 0.7, 3.0, 9.0, 40.0, 1.0]  # of the undesirable rows 0.7 stays and 40 becomes 10
    weight = [mpf(1), mpf(0.7), mpf(1), mpf(1), mpf(10), mpf(1)]
    state, history, ema = head.state(6), [], [mpf(0), mpf(0)]
    for seed in (1, 2, 3):
        x = rows(head, seed, state={k: v.double() for k, v in state.items()})
        if cls is BCOMatched:
            x = change(x, columns={"density_ratio": torch.tensor(ratio, dtype=F64)})
        if seed == 3:
            x = change(x, label=torch.ones_like(LABELS))
        sides = class_means(x, 0.4)
        history += sides[0] + sides[1]
        ema = [(mean(s) if seed == 1 else mpf(0.7) * e + mpf(0.3) * mean(s)) if s else e for e, s in zip(ema, sides)]
        delta = mean(history) if shift == "trl" else mean(ema)
        check_objective(head, shifted(x, delta, 0.4, weight if cls is BCOMatched and seed != 3 else None), x)
        out = head(x)
        assert_close(next(iter(out.metrics.values())), torch.full((6,), float(delta), dtype=F64))
        state = out.state
    assert state["rows"].tolist() == [14, 4]


def test_bco_before_one_kind_of_rows_was_seen() -> None:
    """The other kind's mean is the shift."""
    head = BCO(beta=0.4)
    x = rows(head, label=-torch.ones_like(LABELS))
    check_objective(head, shifted(x, mean(class_means(x, 0.4)[1]), 0.4), x)


COVERED: set[type[Head]] = {KTO, APOZeroUnpaired, BCO, BCOMatched, NPO, NPONLL, NPOKL}


P_LABELS = torch.tensor([[1]] * 3 + [[-1]] * 3)


def six_rows() -> HeadInput:
    """The three chosen responses of P, then the three rejected ones, each a row."""
    return given([[v] for v in WIN + LOSE], [[v] for v in WIN_REF + LOSE_REF], SIZES, P_LABELS.tolist())


def test_kto_vector() -> None:
    """HALOs, TRL 1.16; their z0 of 0.2."""
    x = change(six_rows(), mismatch=torch.tensor([0.3, -0.1, 0.45, 0.15, 0.2, 0.2], dtype=F64))
    grad = column([-0.004166, -0.004145, -0.004165, 0.004157, 0.004155, 0.004155])
    check(KTO(), x, 0.499159, grad, [0.492501, 0.536187, 0.490001, 0.476268, 0.526226, 0.473774])


def test_apo_zero_unpaired_vector() -> None:
    """TRL 1.16."""
    grad = column([-0.004164, -0.004150, -0.004163, 0.004161, 0.004150, 0.004159])
    check(APOZeroUnpaired(), six_rows(), 0.499158, grad)


@pytest.mark.parametrize("shift", ["paper", "trl"])
def test_bco_vector_of_a_first_step(shift: str) -> None:
    """TRL 1.10's BCOTrainer.bco_loss; three rows of each kind, so that both shifts are -0.008333."""
    head = BCO(shift=shift)  # type: ignore[arg-type]
    x = change(six_rows(), state={k: v.double() for k, v in head.state(6).items()})
    grad = column([-0.008090, -0.008819, -0.008049, 0.008056, 0.008888, 0.008014])
    check(head, x, 0.692517, grad, [0.664406, 0.753181, 0.659564, 0.660369, 0.762034, 0.655548])
    assert head(x).metrics["bco/delta"].tolist() == pytest.approx([-0.05 / 6] * 6)


@pytest.mark.parametrize(
    ("delta", "loss", "better", "worse"),
    [
        (0.02, 1.385235, [-0.016417, -0.017873, -0.016333], [0.015876, 0.017541, 0.015792]),
        # TRL 1.16 bco_pair, NCA repo biasedNCA: no shift
        (0.0, 1.385052, [-0.016250, -0.017707, -0.016167], [0.016042, 0.017707, 0.015959]),
    ],
)
def test_bco_vectors_of_a_long_history(delta: float, loss: float, better: list[float], worse: list[float]) -> None:
    """After very many rows TRL's mean stands still. The figures are per pair of rows, hence the halves."""
    state = {"mean": torch.full((2,), delta, dtype=F64), "rows": torch.full((2,), 1e12, dtype=F64)}
    x = change(six_rows(), state=state)
    check(BCO(shift="trl"), x, loss / 2, column([v / 2 for v in better + worse]))


def test_npo_vector() -> None:
    """A transcription of the authors' code; the rejected rows of P."""
    x = given(column(LOSE), column(LOSE_REF), SIZES[3:], [[-1]] * 3)
    check(NPO(), x, 13.769995, column([0.320839, 0.354140, 0.319175]))


@pytest.mark.parametrize(
    ("head", "losses", "grad"),
    [
        (KTO(), [0.5, 0.5], [-0.025, 0.025]),
        (APOZeroUnpaired(), [0.5, 0.5], [-0.025, 0.025]),
        (BCO(), [0.693147, 0.693147], [-0.05, 0.05]),
        (BCOMatched(), [0.693147, 0.693147], [-0.05, 0.05]),
        (NPO(), [0.0, 13.862944], [0.0, 1.0]),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_values_at_policy_equals_reference(head: Head, losses: list[float], grad: list[float]) -> None:
    """A desirable row, then an undesirable one; gradients of the sum over rows."""
    x = random_input(head, [[1], [1]], same=True)
    ones = {name: torch.ones(2, dtype=F64) for name in x.columns}
    x = change(x, label=torch.tensor([[1], [-1]]), mismatch=torch.zeros(2, dtype=F64), columns=ones)
    loss, grad_T = loss_and_grad(head, x)
    assert_close(loss.flatten(), torch.tensor(losses, dtype=F64), rtol=0, atol=6e-7)
    assert_close(2 * grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=1e-12)

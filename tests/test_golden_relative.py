"""Relative PO and SSPO against their papers' formulas (mpmath), and against figures that were computed elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads_golden import (
    PAIR_LENGTHS,
    PAIR_LOGP,
    PAIR_REF,
    Objective,
    check_objective,
    from_sums,
    sigmoid,
    softmax,
    token_values,
)
from heads_support import F64, change, loss_and_grad, random_input
from mpmath import exp, log, mp, mpf, ncdf, sqrt
from torch.testing import assert_close
from unpaired_support import LABELS, LENGTHS, LOSE, LOSE_REF, SIZES, WIN, WIN_REF, check, column, given, mean, sums

from po.heads.rpo_contrast import RPOContrast
from po.heads.rpo_contrast_unpaired import RPOContrastUnpaired
from po.heads.rpo_diagonal import RPODiagonal
from po.heads.sspo import POINTS, SSPO
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {RPOContrast, RPOContrastUnpaired, RPODiagonal, SSPO}
PAIRS = ((3, 5), (1, 2), (4, 1), (1, 1))
EMBEDDING = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=F64)


def distance(a: list[float], b: list[float]) -> mpf:
    product, norms = sum(mpf(p) * mpf(q) for p, q in zip(a, b)), [sqrt(sum(mpf(p) ** 2 for p in v)) for v in (a, b)]
    return 1 - product / (norms[0] * norms[1])


def contrast(x: HeadInput, chosen: list[int], rejected: list[int], beta: float, tau: float, pairs: bool) -> Objective:
    """Per chosen row, the mean over the rejected ones; row numbers are groups."""
    e = x.prompt_embedding_GE.tolist()
    weight = {i: softmax([-distance(e[i], e[j]) / mpf(tau) for j in rejected]) for i in chosen}

    def losses(policy: list[mpf]) -> list[mpf]:
        u = sums(x, policy)
        b = [u[j][1] if pairs else u[j][0] for j in rejected]
        return [mean([-log(sigmoid(mpf(beta) * w * (u[i][0] - v))) for w, v in zip(weight[i], b)]) for i in chosen]

    return losses


@pytest.mark.parametrize(("beta", "tau"), [(0.1, 0.5), (0.7, 0.25), (2.0, 3.0)])
def test_relative_po(beta: float, tau: float) -> None:
    x = random_input(RPOContrast(), PAIRS, seed=3)
    check_objective(RPOContrast(beta, tau), contrast(x, [*range(4)], [*range(4)], beta, tau, pairs=True), x)


@pytest.mark.parametrize(("beta", "tau"), [(0.1, 0.5), (0.7, 0.25)])
def test_unpaired_relative_po(beta: float, tau: float) -> None:
    """Four rows of six are desirable: they carry 6/4 of their loss, so that the mean over rows is the one over them."""
    x = change(random_input(RPOContrastUnpaired(), LENGTHS, seed=3), label=LABELS)
    per_chosen = contrast(x, [0, 2, 3, 5], [1, 4], beta, tau, pairs=False)

    def losses(policy: list[mpf]) -> list[mpf]:
        a, b, c, d = (mpf(6) / 4 * v for v in per_chosen(policy))
        return [a, mpf(0), b, c, mpf(0), d]

    check_objective(RPOContrastUnpaired(beta, tau), losses, x)


@pytest.mark.parametrize("label", [1, -1])
def test_unpaired_relative_po_of_one_kind_of_rows_is_nothing(label: int) -> None:
    x = change(random_input(RPOContrastUnpaired(), LENGTHS, seed=3), label=torch.full((6, 1), label))
    loss_G, grad_T = loss_and_grad(RPOContrastUnpaired(), x)
    assert loss_G.tolist() == [0] * 6
    assert grad_T.tolist() == [0] * 16


@pytest.mark.parametrize(("beta", "diagonal_weight"), [(0.1, 0.8), (0.7, 0.3), (0.7, 0.0)])
def test_diagonal_relative_po(beta: float, diagonal_weight: float) -> None:
    x = random_input(RPODiagonal(), PAIRS, seed=3)
    g = mpf(diagonal_weight)

    def losses(policy: list[mpf]) -> list[mpf]:
        u = sums(x, policy)
        each = [[-log(sigmoid(mpf(beta) * (w - v))) for _, v in u] for w, _ in u]
        return [g * row[i] + (1 - g) * mean([v for j, v in enumerate(row) if j != i]) for i, row in enumerate(each)]

    check_objective(RPODiagonal(beta, diagonal_weight), losses, x)


# Figures of an independent float64 script on which the authors' executed code agrees.


def three_pairs() -> HeadInput:
    return change(from_sums(PAIR_LOGP, PAIR_REF, PAIR_LENGTHS, [[1.0, 0.0]] * 3), prompt_embedding=EMBEDDING)


BETTER, WORSE = [-0.005476, -0.005729, -0.005407], [0.005213, 0.006456, 0.004943]


def test_relative_po_vector() -> None:
    x, rows = three_pairs(), [0.684800, 0.717446, 0.679415]
    check(RPOContrast(), x, 0.693887, [*zip(BETTER, WORSE)], rows)  # type: ignore[list-item]
    own_G = RPOContrast()(x).metrics["rpo_contrast/own_weight"]
    assert_close(own_G, torch.tensor([0.553816, 0.471776, 0.631049], dtype=F64), rtol=0, atol=6e-7)


def test_relative_po_vector_without_pairs() -> None:
    """The same six responses as rows: the chosen ones' losses, twice, and the pairs' mean and gradient."""
    x = given(column(WIN + LOSE), column(WIN_REF + LOSE_REF), SIZES, [[1]] * 3 + [[-1]] * 3)
    x = change(x, prompt_embedding=EMBEDDING.repeat(2, 1))
    rows = [2 * 0.684800, 2 * 0.717446, 2 * 0.679415, 0, 0, 0]
    assert_close(RPOContrastUnpaired()(x).loss, torch.tensor(rows, dtype=F64), rtol=0, atol=1.2e-6)
    check(RPOContrastUnpaired(), x, 0.693887, column(BETTER + WORSE))


def test_diagonal_relative_po_vector() -> None:
    better, worse = [-0.015785, -0.018400, -0.015644], [0.015764, 0.018441, 0.015623]
    rows = [0.642007, 0.803932, 0.634028]
    check(RPODiagonal(), three_pairs(), 0.693322, [*zip(better, worse)], rows)  # type: ignore[list-item]


@pytest.mark.parametrize("head", [RPOContrast(), RPODiagonal()])
def test_values_at_policy_equals_reference(head: Head) -> None:
    """Gradients as of plain DPO for the diagonal; weighted by w_ij, which add up to 1, and by 1/3 otherwise."""
    x = change(random_input(head, [[1, 1]] * 3, same=True), prompt_embedding=EMBEDDING)
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.full((3,), 0.693147, dtype=F64), rtol=0, atol=6e-7)
    share = 1.0 if isinstance(head, RPODiagonal) else 1 / 3
    assert_close(3 * grad_T[::2], torch.full((3,), -0.05 * share, dtype=F64), rtol=0, atol=1e-12)


# SSPO

GROUPS = ((3, 1), (2, 5, 2, 1), (1, 4), (6,), (1, 2), (2, 3, 1))
KINDS = torch.tensor([[1, -1, 0, 0], [1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, -1, 0]])
KINDS_OF_ONE_SIDE = torch.tensor([[0, 0, 0, 0]] * 6)


def rewards(x: HeadInput, policy: list[mpf], beta: float) -> list[list[list[mpf]]]:
    """By group: the rewards of desirable, undesirable and unlabelled responses."""
    r = [[mpf(beta) * mean(t) for t in g] for g in token_values(x, policy)]
    kinds = x.label_GK.tolist()
    return [[[v for v, s in zip(g, labels) if s == side] for side in (1, -1, 0)] for g, labels in zip(r, kinds)]


def best_threshold(win: list[mpf], lose: list[mpf], width: float, prior: float) -> mpf:
    """Counts the mistakes at each point."""
    low, high = min(lose), max(win)
    grid = [low + (high - low) * k / (POINTS - 1) for k in range(POINTS)]

    def risk(d: mpf) -> mpf:
        missed = mean([ncdf((d - r) / mpf(width)) for r in win])
        return mpf(prior) * missed + (1 - mpf(prior)) * mean([1 - ncdf((d - r) / mpf(width)) for r in lose])

    return min(grid, key=risk)


def sspo(x: HeadInput, head: SSPO, delta: mpf, gamma: mpf) -> Objective:
    """The two risks, spread over the groups that carry them."""
    fixed = rewards(x, [mpf(p) for p in x.policy_T.tolist()], head.beta)
    pairs, opens = (sum(bool(f(g)) for g in fixed) for f in (lambda g: g[0] and g[1], lambda g: g[2]))

    def unlabelled(r: mpf) -> mpf:
        if r > delta:
            return (mpf(head.prior) if head.weigh_prior else 1) * log(1 + exp(delta - r))
        return (1 - mpf(head.prior) if head.weigh_prior else 1) * log(1 + exp(r - delta))

    def losses(policy: list[mpf]) -> list[mpf]:
        out = []
        for win, lose, other in rewards(x, policy, head.beta):
            first = -log(sigmoid(mean(win) - mean(lose))) / pairs if win and lose else 0
            second = mean([unlabelled(r) for r in other]) / opens if other else 0
            out.append(len(fixed) * (gamma * first + (1 - gamma) * second))
        return out

    return losses


SSPO_CASES: list[dict[str, Any]] = [
    {},
    {"beta": 1.5, "bandwidth": 0.3, "ema": 0.4, "prior": 0.3, "lam": 0.5},
    {"beta": 1.5, "threshold": "min", "ema": 0.4, "gamma_0": 0.0},
    {"beta": 1.5, "weigh_prior": True, "prior": 0.3, "gamma_0": 0.2, "lam": 0.0},
]


@pytest.mark.parametrize("fields", SSPO_CASES, ids=str)
def test_sspo_over_three_steps(fields: dict[str, Any]) -> None:
    """The threshold and the counts follow; the third step has no pairs, and keeps the threshold."""
    head = SSPO(**fields)
    state, delta, pairs, opens = head.state(6), mpf(0), 0, 0
    for step in (1, 2, 3):
        x = change(random_input(head, GROUPS, seed=step), state={k: v.double() for k, v in state.items()})
        x = change(x, label=KINDS if step < 3 else KINDS_OF_ONE_SIDE)
        with mp.workdps(25):
            r = rewards(x, [mpf(p) for p in x.policy_T.tolist()], head.beta)
            win, lose = ([v for g in r if g[0] and g[1] for v in g[side]] for side in (0, 1))
            if win:
                kde = head.threshold == "kde"
                new = best_threshold(win, lose, head.bandwidth, head.prior) if kde else min(win)
                delta = new if step == 1 else head.ema * delta + (1 - mpf(head.ema)) * new
            pairs, opens = pairs + sum(bool(g[0] and g[1]) for g in r), opens + sum(bool(g[2]) for g in r)
            gamma = max(mpf(pairs) / (pairs + opens), head.gamma_0 * exp(-head.lam * step))
        check_objective(head, sspo(x, head, delta, gamma), x)
        out = head(x)
        assert_close(out.metrics["sspo/delta"], torch.full((6,), float(delta), dtype=F64))
        state = out.state
    assert [state[k].item() for k in ("step", "pairs", "unlabelled")] == [3, 8, 12]


def test_sspo_vector() -> None:
    """A script that searched [-3, 1] at 40001 points; ours is the coarser one, hence 3e-4 for what depends on d."""
    head = SSPO(beta=1.0, bandwidth=0.2, gamma_0=0.7, lam=0.0)
    logp = [[-1.0, -1.8], [-0.6, -1.2], [-0.9, -1.5], [-0.4, -0.8], [-2.0], [-0.7], [-1.1], [-1.0]]
    x = given(logp, logp, [[1, 1]] * 4 + [[1]] * 4, [[1, -1]] * 4 + [[0]] * 4)
    x = change(x, state={k: v.double() for k, v in head.state(8).items()})
    out = head(x)
    assert out.metrics["sspo/delta"][0].item() == pytest.approx(-1.1267, abs=1.4 / POINTS)
    assert out.metrics["sspo/above"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert out.loss[:4].mean().item() / (0.7 * 2) == pytest.approx(0.439773, abs=6e-7)
    assert out.loss[4:].mean().item() / (0.3 * 2) == pytest.approx(0.540755, abs=3e-4)
    assert out.loss.mean().item() == pytest.approx(0.470068, abs=3e-4)


def test_sspo_vector_of_the_unlabelled_loss() -> None:
    """As in the authors' code: threshold 0.15, beta 10, prior 1/2. Without pairs' weight, 4 of 5 prompts carry it."""
    head = SSPO(beta=10.0, threshold="min", weigh_prior=True, gamma_0=0.0)
    logp = [[0.15, 0.0], [0.4], [-0.7], [1.1], [-0.1]]
    x = given(logp, logp, [[1, 1], [1], [1], [1], [1]], [[1, -1], [0], [0], [0], [0]])
    loss_G = head(change(x, state={k: v.double() for k, v in head.state(5).items()})).loss
    expected = torch.tensor([0.039445, 0.000102, 0.000037, 0.039445], dtype=F64)
    assert_close(loss_G[1:] / (0.8 * 5 / 4), expected, rtol=0, atol=6e-7)


@pytest.mark.parametrize(("t", "gamma"), [(1, 0.999), (500, 0.606531), (2000, 0.227273)])
def test_sspo_s_schedule(t: int, gamma: float) -> None:
    """5 pairs of 22 prompts: 5/22 is the floor."""
    head = SSPO()
    x = given([[-1.0, -2.0]], [[0.0, 0.0]], [[1, 1]], [[1, -1]])
    seen = {"delta": 0.0, "step": t - 1.0, "pairs": 4.0, "unlabelled": 17.0}
    out = head(change(x, state={k: torch.tensor(v, dtype=F64) for k, v in seen.items()}))
    assert out.metrics["sspo/gamma"].item() == pytest.approx(gamma, abs=6e-7)


def test_sspo_before_any_pair() -> None:
    """No threshold, no loss."""
    head = SSPO()
    x = random_input(head, [[2], [3]])
    x = change(x, label=torch.zeros(2, 1, dtype=torch.int64))
    loss_G, grad_T = loss_and_grad(head, x)
    assert loss_G.tolist() == [0, 0]
    assert grad_T.tolist() == [0] * 5

"""AOT, beta-DPO and Feasible Learning beside DPO: where they are it, and what they add."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input, segments
from torch import Tensor
from torch.testing import assert_close

from po.heads.aot import AOT
from po.heads.aot_unpaired import AOTUnpaired
from po.heads.beta_dpo import BetaDPO
from po.heads.dpo import DPO
from po.heads.feasible_dpo import FeasibleDPO
from po.numeric import hashed_uniform
from po.types import Head, HeadInput, Segments

PAIRS = [[0.5, -0.75], [-1.25, 1.25], [0.6, -0.85], [3.0, -4.0], [0.2, 0.1]]


def at_rows(head: Head, rows: Sequence[int], pairs: list[list[float]] = PAIRS, **state: Tensor) -> HeadInput:
    x = input_from_logratios(pairs)
    return change(x, row=torch.tensor(rows), state={**head.state(40), **state})


@pytest.mark.parametrize("head", [AOT(beta=0.3), AOTUnpaired(beta=0.3), BetaDPO(beta=0.3, rho=0, alpha=0)], ids=name_of)
def test_one_pair_a_step_is_dpo(head: Head) -> None:
    for pair in PAIRS:
        x = at_rows(head, [5], [pair])
        assert_close(loss_and_grad(head, x), loss_and_grad(DPO(beta=0.3), x))


def test_beta_dpo_without_its_two_ideas_is_dpo() -> None:
    x = at_rows(BetaDPO(), range(5))
    assert_close(loss_and_grad(BetaDPO(beta=0.3, rho=0, alpha=0), x), loss_and_grad(DPO(beta=0.3), x))


def test_aot_of_equally_ranked_margins_is_dpo() -> None:
    """A reference whose margins are all 0 (or ordered as the policy's) leaves each pair its own."""
    seg = segments([[1, 1]] * 3)
    policy_T = torch.tensor([-1.0, -3.0, -2.0, -2.5, -4.0, -1.0], dtype=F64).requires_grad_(True)
    for ref in ([-2.0] * 6, [-1.0, -2.0, -3.0, -3.5, -2.0, -1.0]):  # margins 0, 0, 0 and 1, 0.5, -1
        x = HeadInput(seg, policy_T, ref=torch.tensor(ref, dtype=F64))
        assert_close(loss_and_grad(AOT(beta=0.3), x), loss_and_grad(DPO(beta=0.3), x))


@pytest.mark.parametrize("head", [AOT(beta=0.3), AOTUnpaired(beta=0.3)], ids=name_of)
def test_aot_s_mean_is_at_most_dpo_s(head: Head) -> None:
    """Of all pairings the sorted one has the least cost under a convex loss."""
    for seed in range(20):
        x = random_input(head, [[2, 2]] * 6, seed=seed)
        loss, dpo = loss_and_grad(head, x)[0].mean(), loss_and_grad(DPO(beta=0.3), x)[0].mean()
        assert loss < dpo + 1e-12


def test_aot_unpaired_forgets_who_was_compared_with_whom() -> None:
    worse = [pair[1] for pair in PAIRS]
    mixed = [[pair[0], v] for pair, v in zip(PAIRS, worse[2:] + worse[:2], strict=True)]
    found, other = (loss_and_grad(AOTUnpaired(), input_from_logratios(rows))[0] for rows in (PAIRS, mixed))
    assert_close(found, other)
    dpo, moved = (loss_and_grad(DPO(), input_from_logratios(rows))[0] for rows in (PAIRS, mixed))
    assert not torch.allclose(dpo, moved)


def test_beta_dpo_raises_beta_where_margins_are_above_the_usual() -> None:
    """h = 1 in every pair, M = 0.1 at the first step: b' = b (1 + 0.6 * 0.9); floored at 0.001 below."""
    x = at_rows(BetaDPO(), range(5), [[1.0, 0.0]] * 5)
    assert_close(BetaDPO()(x).metrics["beta_dpo/beta"], torch.full((5,), 0.154, dtype=F64))
    low = at_rows(BetaDPO(), range(5), [[-50.0, 0.0]] * 5)
    assert_close(BetaDPO()(low).metrics["beta_dpo/beta"], torch.full((5,), 1e-3, dtype=F64))


def test_beta_dpo_keeps_the_mean_over_the_kept() -> None:
    x = at_rows(BetaDPO(), range(5))
    out = BetaDPO(rho=0.4)(x)
    kept_G = out.metrics["beta_dpo/kept"].bool()
    assert kept_G.sum() == 3
    assert (out.loss[~kept_G] == 0).all()
    beta = float(out.metrics["beta_dpo/beta"][0])
    assert_close(out.loss.mean(), loss_and_grad(DPO(beta=beta), x)[0][kept_G].mean(), check_dtype=False)


def test_beta_dpo_s_draw_depends_on_rows_and_step_alone() -> None:
    """Not on the place in the batch, so neither on ranks nor on micro-batches; another step draws anew."""
    head, pairs = BetaDPO(rho=0.5), [[1.0, 0.0]] * 6
    kept = head(at_rows(head, range(6), pairs)).metrics["beta_dpo/kept"]
    turned = head(at_rows(head, range(5, -1, -1), pairs)).metrics["beta_dpo/kept"]
    assert kept.tolist() == turned.flip(0).tolist()
    later = [head(at_rows(head, range(6), pairs, step=torch.tensor(s))).metrics["beta_dpo/kept"] for s in range(1, 20)]
    assert len({tuple(k.tolist()) for k in later}) > 8


def test_hashed_uniform_is_uniform_and_unrelated() -> None:
    """Mean, variance and the correlation of neighbours, over 100,000 whole numbers; never 0 or 1."""
    u = hashed_uniform(torch.arange(100_000)).double()
    assert u.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 100_000))
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)
    for lag in (1, 2, 64):
        assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1].item()) < 4 / math.sqrt(100_000)
    assert 0 < u.min() < u.max() < 1


def test_unweighted_feasible_learning_is_dpo() -> None:
    """The first visit, multipliers 1."""
    x = at_rows(FeasibleDPO(), range(5))
    assert_close(loss_and_grad(FeasibleDPO(beta=0.3), x), loss_and_grad(DPO(beta=0.3), x))


def test_clamped_weighs_gradients_by_its_best_multipliers() -> None:
    """The gradient of (a / 2) [l - epsilon]^2 is that of primal_dual at the multipliers a [l - epsilon]."""
    clamped, primal = (FeasibleDPO(alpha=1.7, epsilon=0.5, algorithm=a) for a in ("clamped", "primal_dual"))  # type: ignore[arg-type]
    x = at_rows(clamped, range(5))
    best = clamped(x).state
    assert_close(loss_and_grad(clamped, x)[1], loss_and_grad(primal, change(x, state=best))[1], rtol=1e-6, atol=1e-9)
    assert (best["multiplier"][:5] > 0).any()


def test_a_feasible_pair_loses_its_weight() -> None:
    """Ten visits far below epsilon: 0, never negative; and it comes back once the loss does."""
    head = FeasibleDPO(dual_lr=0.5, alpha=math.inf)
    state = head.state(1)
    for _ in range(10):
        state = dict(head(change(at_rows(head, [0], [[60.0, 0.0]]), state=state)).state)
    assert state["multiplier"].tolist() == [0]
    state = dict(head(change(at_rows(head, [0], [[-60.0, 0.0]]), state=state)).state)
    assert state["multiplier"].item() == pytest.approx(0.5 * (math.log(1 + math.exp(6)) - 0.3), rel=1e-6)


@pytest.mark.parametrize("algorithm", ["primal_dual", "clamped"])
def test_only_visited_rows_change(algorithm: str) -> None:
    head = FeasibleDPO(algorithm=algorithm)  # type: ignore[arg-type]
    after = head(at_rows(head, [3, 7, 0, 39, 20])).state["multiplier"]
    assert (after != 1).nonzero().flatten().tolist() == [0, 3, 7, 20, 39]


def test_filler_touches_no_multiplier() -> None:
    """Empty groups have row -1, which would be the last one."""
    x = HeadInput(
        Segments(torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.bool)),
        torch.zeros(0, dtype=F64, requires_grad=True),
        ref=torch.zeros(0, dtype=F64),
        row=torch.tensor([-1, -1]),
    )
    for head in (FeasibleDPO(), FeasibleDPO(algorithm="clamped")):
        assert head(change(x, state=head.state(3))).state["multiplier"].tolist() == [1, 1, 1]
    assert BetaDPO()(change(x, state=BetaDPO().state(3))).loss.tolist() == [0, 0]


def test_clamped_needs_a_finite_alpha() -> None:
    with pytest.raises(ValueError, match="needs a finite alpha"):
        FeasibleDPO(algorithm="clamped", alpha=math.inf)

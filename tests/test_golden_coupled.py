"""AOT, beta-DPO and Feasible Learning against their formulas in mpmath, without any code of po, and against figures
that were computed elsewhere. What they remember from step to step is checked by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from heads_golden import (
    PAIR_LENGTHS,
    PAIR_LOGP,
    PAIR_REF,
    check_objective,
    check_pair_vector,
    from_sums,
    sigmoid,
    token_values,
)
from heads_support import F64, change, input_from_logratios, loss_and_grad, name_of, random_input
from mpmath import log, mp, mpf
from torch import Tensor
from torch.testing import assert_close

from po.heads.aot import AOT
from po.heads.aot_unpaired import AOTUnpaired
from po.heads.beta_dpo import BetaDPO
from po.heads.feasible_dpo import FeasibleDPO
from po.types import Head, HeadInput

COVERED: set[type[Head]] = {AOT, AOTUnpaired, BetaDPO, FeasibleDPO}
PAIRS = ((3, 5), (1, 2), (4, 1), (1, 1), (2, 2), (2, 1))
Objective = Callable[[list[mpf]], list[mpf]]


def sums(x: HeadInput, values: list[mpf]) -> list[list[mpf]]:
    return [[sum(tokens) for tokens in group] for group in token_values(x, values)]


def margins(x: HeadInput, policy: list[mpf]) -> list[mpf]:
    ref = sums(x, [mpf(v) for v in x.ref_T.tolist()])
    return [(w - rw) - (b - rb) for (w, b), (rw, rb) in zip(sums(x, policy), ref, strict=True)]


def by_rank(beta: float, u: list[mpf], v: list[mpf]) -> list[mpf]:
    """Each u against the v of its own rank."""
    return [-log(sigmoid(mpf(beta) * (a - sorted(v)[sorted(u).index(a)]))) for a in u]


def aot(beta: float, x: HeadInput) -> Objective:
    v = [w - b for w, b in sums(x, [mpf(v) for v in x.ref_T.tolist()])]
    return lambda policy: by_rank(beta, [w - b for w, b in sums(x, policy)], v)


def aot_unpaired(beta: float, x: HeadInput) -> Objective:
    ref = sums(x, [mpf(v) for v in x.ref_T.tolist()])

    def loss(policy: list[mpf]) -> list[mpf]:
        pairs = [(w - rw, b - rb) for (w, b), (rw, rb) in zip(sums(x, policy), ref, strict=True)]
        return by_rank(beta, [w for w, _ in pairs], [b for _, b in pairs])

    return loss


@pytest.mark.parametrize("beta", [0.01, 0.7])
def test_aot_s_loss_and_gradient_are_the_paper_s(beta: float) -> None:
    x = random_input(AOT(), PAIRS, seed=3)
    assert not torch.equal(*(x.seg.sum(t).diff().argsort(0) for t in (x.policy_T, x.ref_T))), "ranks should differ"
    check_objective(AOT(beta=beta), aot(beta, x), x)
    check_objective(AOTUnpaired(beta=beta), aot_unpaired(beta, x), x)


def test_aot_vectors() -> None:
    """TRL 1.16 agrees: its sorted rows are [0.798139, 0.634946, 0.644397], of the pairs 1, 0 and 2."""
    better = [-0.015668, -0.018328, -0.015834]
    check_pair_vector(AOT(beta=0.1), [0.634946, 0.798139, 0.644397], better, [-g for g in better])
    better, worse = [-0.015626, -0.017000, -0.017208], [0.015626, 0.017208, 0.017000]
    check_pair_vector(AOTUnpaired(beta=0.1), [0.632599, 0.713347, 0.726175], better, worse)


def beta_dpo(head: BetaDPO, x: HeadInput) -> Objective:
    """For the draw that the head reports; b' from where the policy stands, since it is a constant to the gradient."""
    kept = head(x).metrics["beta_dpo/kept"].tolist()
    h = margins(x, [mpf(v) for v in x.policy_T.tolist()])
    mean = mpf(head.momentum) * mpf(float(x.state["mean"])) + (1 - mpf(head.momentum)) * sum(h) / len(h)
    chosen = sum(v for v, k in zip(h, kept, strict=True) if k) / int(sum(kept))
    beta = max(mpf(0.001), mpf(head.beta) * (1 + mpf(head.alpha) * (chosen - mean)))
    share = mpf(len(h)) / int(sum(kept))
    return lambda policy: [
        share * -log(sigmoid(beta * v)) if k else mpf(0) for v, k in zip(margins(x, policy), kept, strict=True)
    ]


@pytest.mark.parametrize(
    "head", [BetaDPO(), BetaDPO(rho=0.5), BetaDPO(rho=0, alpha=5), BetaDPO(beta=0.5), BetaDPO(momentum=0)], ids=name_of
)
def test_beta_dpo_s_loss_and_gradient_are_the_paper_s(head: BetaDPO) -> None:
    x = random_input(head, PAIRS, seed=3)
    state = {"mean": torch.tensor(0.3, dtype=F64), "std": torch.tensor(1.5, dtype=F64), "step": torch.tensor(7)}
    x = change(x, state=state)
    assert int(head(x).metrics["beta_dpo/kept"].sum()) == math.floor((1 - head.rho) * 6)
    with mp.workdps(50):
        objective = beta_dpo(head, x)
    check_objective(head, objective, x)


def pairs_of_the_vectors(state: dict[str, Tensor]) -> HeadInput:
    x = from_sums(PAIR_LOGP, PAIR_REF, PAIR_LENGTHS, [[1.0, 0.0]] * 3)
    return change(x, row=torch.arange(3), state=state)


def check_vector(head: Head, x: HeadInput, rows: list[float], better: list[float]) -> None:
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor(rows, dtype=F64), rtol=0, atol=6e-7)
    grad_GK = torch.tensor([better, [-g for g in better]], dtype=F64).T.contiguous()
    assert_close(grad_T, x.seg.spread(grad_GK), rtol=0, atol=6e-7)


def test_beta_dpo_vector() -> None:
    """The authors' executed code agrees, with a running mean of 0.2 once h = 1.25, -2.5, 1.45 have entered it."""
    before = (0.2 - 0.1 * 0.2 / 3) / 0.9
    state = {"mean": torch.tensor(before, dtype=F64), "std": torch.ones((), dtype=F64), "step": torch.tensor(0)}
    x = pairs_of_the_vectors(state)
    check_vector(BetaDPO(rho=0), x, [0.637299, 0.814745, 0.628670], [-0.014453, -0.017089, -0.014312])
    metrics = BetaDPO(rho=0)(x).metrics
    assert_close(metrics["beta_dpo/mean"], torch.full((3,), 0.2, dtype=F64))
    assert_close(metrics["beta_dpo/beta"], torch.full((3,), 0.092, dtype=F64))


def test_beta_dpo_remembers_mean_and_standard_deviation() -> None:
    """From 0: 0.1 of the first step's, then 0.9 of that and 0.1 of the second's."""
    head = BetaDPO(rho=0)
    x = change(input_from_logratios([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]), row=torch.arange(3), state=head.state(3))
    first = head(x).state
    assert [float(first[k]) for k in ("mean", "std", "step")] == pytest.approx([0.3, 0.2, 1])
    second = head(change(x, state=first)).state
    assert [float(second[k]) for k in ("mean", "std", "step")] == pytest.approx([0.57, 0.38, 2])


def test_beta_dpo_draws_with_the_stated_chances() -> None:
    """Two of four without replacement, over 4000 steps: how often each is kept, against all orders of drawing."""
    z_G = torch.tensor([0.0, 0.5, -1.0, 2.0])
    weights = (-(z_G**2) / 2).exp().tolist()
    head, valid_G, row_G = BetaDPO(rho=0.5), torch.ones(4, dtype=torch.bool), torch.tensor([3, 11, 12, 70])
    kept = torch.stack([head.keep(z_G, valid_G, row_G, torch.tensor(step)) for step in range(4000)])
    assert (kept.sum(-1) == 2).all()
    expected = [0.0] * 4
    for first, then in itertools.permutations(range(4), 2):
        chance = weights[first] / sum(weights) * weights[then] / (sum(weights) - weights[first])
        expected[first] += chance
        expected[then] += chance
    assert kept.double().mean(0).tolist() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(4000))


@pytest.mark.parametrize(
    "head",
    [
        FeasibleDPO(),
        FeasibleDPO(beta=0.5, epsilon=0.01),
        FeasibleDPO(algorithm="clamped"),
        FeasibleDPO(algorithm="clamped", beta=0.5, epsilon=0.6, alpha=2.5),
    ],
    ids=name_of,
)
def test_feasible_dpo_s_loss_and_gradient_are_the_paper_s(head: FeasibleDPO) -> None:
    x = random_input(head, PAIRS, seed=3)
    weights = [0.5, 2.0, 0.0, 1.25, 0.75, 3.0, 9.0]
    row_G = torch.tensor([6, 4, 2, 0, 1, 3])
    x = change(x, row=row_G, state={"multiplier": torch.tensor(weights, dtype=F64)})

    def objective(policy: list[mpf]) -> list[mpf]:
        dpo = [-log(sigmoid(mpf(head.beta) * h)) for h in margins(x, policy)]
        if head.algorithm == "clamped":
            return [mpf(head.alpha) / 2 * max(mpf(0), v - mpf(head.epsilon)) ** 2 for v in dpo]
        return [mpf(weights[r]) * v for r, v in zip(row_G.tolist(), dpo, strict=True)]

    check_objective(head, objective, x)


def test_feasible_dpo_vectors() -> None:
    better = [-0.005197, -0.009856, -0.004998]
    frozen = {"multiplier": torch.tensor([0.332599, 0.525939, 0.323273], dtype=F64)}
    check_vector(FeasibleDPO(), pairs_of_the_vectors(frozen), [0.210402, 0.434394, 0.201487], better)
    clamped = FeasibleDPO(algorithm="clamped")
    check_vector(clamped, pairs_of_the_vectors(clamped.state(3)), [0.055311, 0.138306, 0.052253], better)


@pytest.mark.parametrize(
    ("head", "once", "twice"),
    [
        (FeasibleDPO(), [0.332599, 0.525939, 0.323273], [0.332599, 0.525939, 0.323273]),
        (
            FeasibleDPO(epsilon=0.001, alpha=2.0),
            [1.131599, 1.324939, 1.122273],
            [1.197399, 1.487409, 1.183410],
        ),
        (
            FeasibleDPO(dual_lr=0.5, alpha=math.inf),
            [1.166300, 1.262970, 1.161637],
            [1.332599, 1.525939, 1.323273],
        ),
        (FeasibleDPO(algorithm="clamped"), [0.332599, 0.525939, 0.323273], [0.332599, 0.525939, 0.323273]),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_multipliers_after_one_and_two_visits(head: FeasibleDPO, once: list[float], twice: list[float]) -> None:
    """The experiments' setting, the trainer's defaults, plain Feasible Learning; with the losses unchanged."""
    first = head(pairs_of_the_vectors(head.state(3))).state
    second = head(pairs_of_the_vectors(dict(first))).state
    assert first["multiplier"].tolist() == pytest.approx(once, abs=6e-7)
    assert second["multiplier"].tolist() == pytest.approx(twice, abs=6e-7)


@pytest.mark.parametrize(
    ("head", "loss", "slope"),
    [
        (AOT(beta=0.1), math.log(2), 0.05),
        (AOTUnpaired(beta=0.1), math.log(2), 0.05),
        (BetaDPO(beta=0.1, rho=0), math.log(2), 0.05),
        (FeasibleDPO(beta=0.1), math.log(2), 0.05),
        (FeasibleDPO(beta=0.1, algorithm="clamped"), (math.log(2) - 0.3) ** 2 / 2, 0.05 * (math.log(2) - 0.3)),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_values_at_policy_equals_reference(head: Head, loss: float, slope: float) -> None:
    x = input_from_logratios([[0.0, 0.0]])
    loss_G, grad_T = loss_and_grad(head, change(x, row=torch.arange(1), state=head.state(1)))
    assert_close(loss_G, torch.tensor([loss], dtype=F64))
    assert_close(grad_T, torch.tensor([-slope, slope], dtype=F64))

"""Loss and gradient of the heads from offline reinforcement learning and of those that learn from negatives, against
their formulas (mpmath, tests/heads_golden.py) and against figures that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads_golden import Formula, Objective, Response, check_formula, check_objective, from_sums, token_values
from heads_support import F64, Lengths, change, loss_and_grad, name_of, random_input, segments
from mpmath import exp, mpf
from torch.testing import assert_close

from po.heads.a_lol import ALoL
from po.heads.a_lol_kl import ALoLKL
from po.heads.a_lol_ref_free import ALoLRefFree
from po.heads.a_lol_seq import ALoLSeq
from po.heads.nat import NAT
from po.heads.redi import REDI
from po.heads.topr import TOPR
from po.types import Head, HeadInput

ONE: Lengths = ((3,), (1,), (5,), (2,), (1,), (4,))  # one response a row
SETS: Lengths = ((2, 1, 3, 1), (1, 3), (2, 1, 1), (2,))


def redi(alpha: float) -> Formula:
    def loss(lp: list[Response], _: list[mpf]) -> mpf:
        return -sum(lp[0]) / len(lp[0]) + mpf(alpha) * sum(lp[1]) / len(lp[1])

    return loss


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.0])
def test_redi_is_its_formula(alpha: float) -> None:
    check_formula(REDI(alpha=alpha), redi(alpha))


def with_labels(head: Head) -> HeadInput:
    return change(random_input(head, ONE, seed=3), label=torch.tensor([[1], [-1], [-1], [1], [1], [-1]]))


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_nat_is_weighted_likelihood(weight: float) -> None:
    x = with_labels(NAT())
    counts = [1 if x.label_GK[s, 0] > 0 else mpf(weight) for s in x.seg.slot_T.tolist()]
    check_objective(
        NAT(negative_weight=weight), lambda policy: [-c * p for c, p in zip(counts, policy, strict=True)], x
    )


def constants(x: HeadInput, base: list[float]) -> list[list[Response]]:
    """log pi - base of each token as it is now: what a weight that is not differentiated is made of."""
    now = [mpf(p) - mpf(b) for p, b in zip(x.policy_T.tolist(), base, strict=True)]
    return token_values(x, now)


def topr(x: HeadInput, baseline: float, mean: bool, both: bool) -> Objective:
    ratio = constants(x, x.old_T.tolist())

    def losses(policy: list[mpf]) -> list[mpf]:
        out = []
        for g, ((tokens,), (change_of,)) in enumerate(zip(token_values(x, policy), ratio, strict=True)):
            R = x.label_GK[g, 0].item()
            w = min(exp(sum(change_of)), mpf(1)) if R < 0 or both else mpf(1)
            out.append(-w * (R - mpf(baseline)) * sum(tokens) / (len(tokens) if mean else 1))
        return out

    return losses


@pytest.mark.parametrize(
    "head",
    [TOPR(), TOPR(baseline=-0.4), TOPR(length_normalize=True), TOPR(truncate_positives=True)],
    ids=name_of,
)
def test_topr_is_its_formula(head: TOPR) -> None:
    x = with_labels(head)
    check_objective(head, topr(x, head.baseline, head.length_normalize, head.truncate_positives), x)


def advantage(x: HeadInput) -> list[list[mpf]]:
    value = x.column_G("value").tolist()
    rewards = [[r for r, v in zip(row, valid, strict=True) if v] for row, valid in
               zip(x.reward_GK.tolist(), x.seg.valid_GK.tolist(), strict=True)]  # fmt: skip
    return [[max(mpf(r) - mpf(v), mpf(0)) for r in row] for row, v in zip(rewards, value, strict=True)]


def clip(x: mpf, e: float) -> mpf:
    return min(max(x, 1 - mpf(e)), 1 + mpf(e))


def each(x: HeadInput, loss: Callable[[int, int, mpf, Response], mpf]) -> Objective:
    """loss(g, k, advantage, log-probs) of every response."""
    A = advantage(x)
    assert {a > 0 for row in A for a in row} == {True, False}

    def losses(policy: list[mpf]) -> list[mpf]:
        return [
            loss(g, k, A[g][k], lp) for g, group in enumerate(token_values(x, policy)) for k, lp in enumerate(group)
        ]

    return losses


@pytest.mark.parametrize("epsilon", [0.9, 0.6])
def test_a_lol_is_its_formula(epsilon: float) -> None:
    x = random_input(ALoL(), SETS, seed=3)
    u = constants(x, x.ref_T.tolist())
    check_objective(
        ALoL(epsilon=epsilon), each(x, lambda g, k, A, lp: -A * clip(exp(sum(u[g][k])), epsilon) * sum(lp)), x
    )


def test_a_lol_ref_free_is_its_formula() -> None:
    x = random_input(ALoLRefFree(), SETS, seed=3)
    check_objective(ALoLRefFree(), each(x, lambda g, k, A, lp: -A * sum(lp)), x)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_a_lol_kl_is_its_formula(beta: float) -> None:
    x = random_input(ALoLKL(), SETS, seed=3)
    ref = token_values(x, [mpf(r) for r in x.ref_T.tolist()])

    def loss(g: int, k: int, A: mpf, lp: Response) -> mpf:
        return -A * sum(lp) + mpf(beta) * (sum(lp) - sum(ref[g][k])) if A > 0 else mpf(0)

    check_objective(ALoLKL(beta=beta), each(x, loss), x)


@pytest.mark.parametrize("epsilon", [0.9, 0.2])
def test_a_lol_seq_is_its_formula(epsilon: float) -> None:
    x = random_input(ALoLSeq(), SETS, seed=3)
    u = constants(x, x.ref_T.tolist())

    def loss(g: int, k: int, A: mpf, lp: Response) -> mpf:
        return -A * sum(clip(exp(d), epsilon) * p for d, p in zip(u[g][k], lp, strict=True))

    check_objective(ALoLSeq(epsilon=epsilon), each(x, loss), x)


COVERED: set[type[Head]] = {REDI, NAT, TOPR, ALoL, ALoLRefFree, ALoLKL, ALoLSeq}


# Figures of an independent float64 script, to 6 decimals: four responses of one prompt, their summed log-probs by
# the policy, its reference and the sampler.
LOGP, REF, OLD = [-12.3, -15.1, -9.8, -20.4], [-13.0, -14.2, -10.5, -19.9], [-12.5, -14.9, -10.3, -20.1]
LENGTHS = [7, 9, 5, 11]


def check_vector(head: Head, x: HeadInput, loss: float, grad: list[list[float]]) -> None:
    """The mean over the responses, and its gradient with respect to each response's summed log-prob."""
    loss_GK, grad_T = loss_and_grad(head, x)
    assert loss_GK.mean().item() == pytest.approx(loss, abs=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor(grad, dtype=F64)), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("alpha", "loss", "grad"),
    [
        (0.8, 0.414921, [-0.142857, 0.088889]),
        (1.0, 0.079365, [-0.142857, 0.111111]),
        (0.0, 1.757143, [-0.142857, 0.0]),
    ],
)
def test_redi_vectors(alpha: float, loss: float, grad: list[float]) -> None:
    x = from_sums([LOGP[:2]], [REF[:2]], [LENGTHS[:2]], [[1.0, 0.0]])
    check_vector(REDI(alpha=alpha), x, loss, [grad])


@pytest.mark.parametrize(
    ("head", "loss", "grad"),
    [
        (TOPR(), -0.628173, [0.25, -0.25, -0.25, 0.185205]),
        (TOPR(length_normalize=True), 0.126688, [0.035714, -0.027778, -0.05, 0.016837]),
        (TOPR(truncate_positives=True), -1.312464, [0.25, -0.204683, -0.25, 0.185205]),
    ],
    ids=lambda v: name_of(v) if isinstance(v, Head) else "",
)
def test_topr_vectors(head: Head, loss: float, grad: list[float]) -> None:
    x = from_sums([[v] for v in LOGP], [[v] for v in OLD], [[n] for n in LENGTHS], [[0.0]] * 4)
    x = change(x, old=x.ref_T, ref=None, label=torch.tensor([[-1], [1], [1], [-1]]))
    check_vector(head, x, loss, [[g] for g in grad])


def with_advantages(*advantages: float) -> HeadInput:
    """Rewards that are these advantages above a value of 0.25."""
    x = from_sums([LOGP], [REF], [LENGTHS], [[a + 0.25 for a in advantages]])
    return change(x, columns={"value": torch.tensor([0.25], dtype=F64)})


@pytest.mark.parametrize("last", [0.0, -3.0])
def test_a_lol_vectors(last: float) -> None:
    """The fourth response is no better than expected. In the figure of the KL form it still has its penalty, 0.1 times
    a log-ratio of -0.5 over 4 and the slope 0.1 / 4: the authors leave such a response out, and here it has no loss."""
    x = with_advantages(0.8, 0.1, 0.4, last)
    check_vector(ALoL(), x, 6.68948, [[-0.38, -0.010164, -0.19, 0.0]])
    check_vector(ALoLRefFree(), x, 3.8175, [[-0.2, -0.025, -0.1, 0.0]])
    check_vector(ALoLKL(beta=0.1), x, 3.8175 + 0.1 * 0.5 / 4, [[-0.175, 0.0, -0.075, 0.025 - 0.1 / 4]])


def test_a_lol_seq_vector() -> None:
    logp = [-1, -0.5, -2, -0.3, -0.7, -1.2, -0.9, -0.4, -1.5, -2.2, -0.1, -0.6, -1.1]
    ref = [-1.1, -0.3, -2.3, -0.35, -0.6, -1.4, -0.9, -0.7, -1.2, -2.4, -0.2, -0.5, -1.1]
    grad = [-0.221034, -0.163746, -0.269972, -0.210254, -0.022621, -0.030535, -0.025, -0.134986, -0.074082]
    grad += [-0.06107, -0.055259, -0.045242, -0.05]
    x = HeadInput(
        segments([[4, 3, 2, 4]]),
        torch.tensor(logp, dtype=F64).requires_grad_(True),
        ref=torch.tensor(ref, dtype=F64),
        reward=torch.tensor([[1.8, 1.1, 1.4, 1.2]], dtype=F64),
        columns={"value": torch.tensor([1.0], dtype=F64)},
    )
    loss_GK, grad_T = loss_and_grad(ALoLSeq(), x)
    assert loss_GK.mean().item() == pytest.approx(1.368046, abs=6e-7)
    assert_close(grad_T, torch.tensor(grad, dtype=F64), rtol=0, atol=6e-7)


@pytest.mark.parametrize("head", [ALoL(), ALoLSeq()], ids=name_of)
def test_a_lol_at_policy_equals_reference(head: Head) -> None:
    """Ratios of 1: -A log pi, and the gradient -A / 4."""
    x = change(with_advantages(0.8, 0.1, 0.4, -1.0), ref=None)
    x = change(x, ref=x.policy_T.detach())
    loss_GK, grad_T = loss_and_grad(head, x)
    assert_close(loss_GK, torch.tensor([[0.8 * 12.3, 0.1 * 15.1, 0.4 * 9.8, 0.0]], dtype=F64))
    assert_close(grad_T, x.seg.spread(torch.tensor([[-0.2, -0.025, -0.1, 0.0]], dtype=F64)))


def test_topr_at_policy_equals_sampler_is_reinforce() -> None:
    x = with_labels(TOPR())
    x = change(x, old=x.policy_T.detach())
    loss_GK, grad_T = loss_and_grad(TOPR(), x)
    R_GK = x.label_GK.double()
    assert_close(loss_GK, (-R_GK * x.seg.sum(x.policy_T)).detach())
    assert_close(grad_T, -x.seg.spread(R_GK) / len(ONE))

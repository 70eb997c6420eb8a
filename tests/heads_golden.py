"""What golden tests share: the inputs, and a formula's loss and gradient in mpmath without any of po's code.

A formula is the paper's, naive (exp, log, sums over lists), at 50 digits; gradients are central differences with a step
of 1e-20. The inputs P (pairs) and S (a set) are those on which public implementations were run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from heads_support import F64, Lengths, grid, loss_and_grad, random_input, segments
from mpmath import exp, mp, mpf
from torch.testing import assert_close

from po.objective import counted, scope
from po.types import Head, HeadInput

Response = list[mpf]  # log pi/ref of each token; log pi where the head has no reference
Formula = Callable[[list[Response], list[mpf]], mpf]  # log-ratios and rewards of one group -> its loss
Objective = Callable[[list[mpf]], list[mpf]]  # log pi of each token -> the loss of each unit that counts


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + exp(-x))


def softmax(xs: list[mpf]) -> list[mpf]:
    return [exp(x) / sum(exp(y) for y in xs) for x in xs]


RAGGED: dict[str, Lengths] = {
    "pair": ((3, 5), (1, 2), (4, 1), (1, 1)),
    "set": ((2, 1, 3, 1, 2, 1), (1, 3), (2, 1, 1), (2,)),
}


def expected(formula: Formula, x: HeadInput) -> tuple[list[float], list[float]]:
    """Losses per group, and the gradient of their mean over groups per token."""
    G, K = x.seg.valid_GK.shape
    owner = x.seg.slot_T.tolist()
    base = [0.0] * len(owner) if x.ref is None else x.ref_T.tolist()
    logratio = [mpf(p) - mpf(r) for p, r in zip(x.policy_T.tolist(), base, strict=True)]

    def loss(g: int, values: list[mpf]) -> mpf:
        slots = [s for s in range(g * K, (g + 1) * K) if s in owner]
        tokens = [[v for v, s in zip(values, owner, strict=True) if s == slot] for slot in slots]
        rewards = [] if x.reward is None else [mpf(float(x.reward.flatten()[s])) for s in slots]
        return formula(tokens, rewards)

    step = mpf(10) ** -20
    grads = []
    for t, s in enumerate(owner):
        up, down = ([*logratio[:t], logratio[t] + d, *logratio[t + 1 :]] for d in (step, -step))
        grads.append(float((loss(s // K, up) - loss(s // K, down)) / (2 * step) / G))
    return [float(loss(g, logratio)) for g in range(G)], grads


def check_formula(head: Head, formula: Formula) -> None:
    """Loss and gradient on random ragged input equal the formula's."""
    x = random_input(head, RAGGED[head.needs.layout], seed=3)
    with mp.workdps(50):
        loss, grad = expected(formula, x)
    assert_close(loss_and_grad(head, x), (torch.tensor(loss, dtype=F64), torch.tensor(grad, dtype=F64)))


def check_objective(head: Head, objective: Objective, x: HeadInput) -> None:
    """The same for heads that read more than a group's log-ratios: the losses of the units that count, in order, and
    the gradient of their mean. `objective` reads what it needs of x itself."""
    mask = counted(x, scope(head.needs))
    step = mpf(10) ** -20
    with mp.workdps(50):
        policy = [mpf(p) for p in x.policy_T.tolist()]
        losses = objective(policy)
        grads = []
        for t in range(len(policy)):
            up, down = (sum(objective([*policy[:t], policy[t] + d, *policy[t + 1 :]])) for d in (step, -step))
            grads.append(float((up - down) / (2 * step) / len(losses)))
    loss, grad_T = loss_and_grad(head, x)
    assert_close(loss[mask], torch.tensor([float(v) for v in losses], dtype=F64))
    assert_close(grad_T, torch.tensor(grads, dtype=F64))


def token_values(x: HeadInput, values: list[mpf]) -> list[list[Response]]:
    """Numbers of tokens by group and response: [g][k][i]. Groups are ragged, so empty places are left out."""
    G, K = x.seg.valid_GK.shape
    owner = x.seg.slot_T.tolist()
    slots = [[s for s in range(g * K, (g + 1) * K) if s in owner] for g in range(G)]
    return [[[v for v, o in zip(values, owner, strict=True) if o == s] for s in group] for group in slots]


PAIR_LOGP = [[-12.5, -14.0], [-20.25, -18.5], [-8.0, -9.75]]
PAIR_REF = [[-13.0, -13.25], [-19.0, -19.75], [-8.6, -8.9]]
PAIR_LENGTHS = ((5, 6), (8, 7), (3, 4))
SET_LOGP, SET_REF = [[-10.0, -12.0, -11.0, -15.0]], [[-10.5, -11.5, -11.25, -14.0]]
SET_REWARD, SET_LENGTHS = [[8.0, 6.5, 7.0, 2.0]], ((4, 6, 5, 7),)


def from_sums(
    logp: list[list[float]], ref: list[list[float]], lengths: Lengths, reward: list[list[float]]
) -> HeadInput:
    """Summed log-probs spread evenly over the tokens: the gradient of a sum is the gradient of each of its tokens."""
    seg = segments(lengths)
    per_token = [seg.spread(grid(v) / seg.length_GK) for v in (logp, ref)]
    return HeadInput(seg, per_token[0].requires_grad_(True), ref=per_token[1], reward=grid(reward))


def check_pair_vector(head: Head, rows: list[float], better: list[float], worse: list[float]) -> None:
    """Losses on P, and the gradient of their mean with respect to each response's summed log-prob, to 6 decimals."""
    x = from_sums(PAIR_LOGP, PAIR_REF, PAIR_LENGTHS, [[1.0, 0.0]] * 3)
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor(rows, dtype=F64), rtol=0, atol=6e-7)
    grad_GK = torch.tensor([better, worse], dtype=F64).T.contiguous()
    assert_close(grad_T, x.seg.spread(grad_GK), rtol=0, atol=6e-7)


def check_set_vector(head: Head, loss: float, grad: list[float]) -> None:
    """Loss on S and its gradient with respect to each response's summed log-prob, to 6 decimals."""
    x = from_sums(SET_LOGP, SET_REF, SET_LENGTHS, SET_REWARD)
    loss_G, grad_T = loss_and_grad(head, x)
    assert_close(loss_G, torch.tensor([loss], dtype=F64), rtol=0, atol=6e-7)
    assert_close(grad_T, x.seg.spread(torch.tensor([grad], dtype=F64)), rtol=0, atol=6e-7)

"""The three-armed bandit of CoPG's paper (arXiv:2406.19185): a policy of three logits, pairs of arms that two fixed
distributions drew, a reward for each arm. Small enough to know the optimum, the bias of every method and why.

Dimensions: S seeds, trained side by side and independently; B pairs of a batch; A arms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from po.heads import HEADS
from po.types import HeadInput, Segments

F64 = torch.float64
BETA, PAIRS, BATCH, RATE = 0.5, 10_000, 512, 1e-3
REWARD_A = torch.tensor([2.5, 2.0, 1.0], dtype=F64)
DRAWN_2A = torch.tensor([[0.1, 0.2, 0.7], [0.05, 0.05, 0.9]], dtype=F64)  # who drew the first arm of a pair, the second
ARMS = len(REWARD_A)
BEST_A = (REWARD_A / BETA).softmax(-1)  # pi* is proportional to ref exp(R / beta), and the reference is uniform

Loss = Callable[[HeadInput, Tensor], Tensor]  # (pairs as a head sees them, logits (S, A)) -> loss of each pair


def objective(logits_SA: Tensor) -> Tensor:
    """J = E[R] - beta KL(pi || uniform), exactly. (S,)"""
    logp_SA = logits_SA.log_softmax(-1)
    return (logp_SA.exp() * (REWARD_A - BETA * (logp_SA + math.log(ARMS)))).sum(-1)


def regret(logits_SA: Tensor) -> Tensor:
    """J(pi*) - J(pi). (S,)"""
    return objective(BEST_A.log()) - objective(logits_SA)


def pairs(arms_SB2: Tensor, logits_SA: Tensor) -> HeadInput:
    """Pairs as po feeds them to a head: an arm is a response of one token, a pair a group of two responses."""
    logp_T = logits_SA.log_softmax(-1).gather(-1, arms_SB2.flatten(1)).flatten()
    reward_GK = REWARD_A[arms_SB2].view(-1, 2)
    seg = Segments(torch.arange(len(logp_T)), torch.ones_like(reward_GK, dtype=torch.bool))
    return HeadInput(seg, logp_T, ref=torch.full_like(logp_T, -math.log(ARMS)), reward=reward_GK, best_first=True)


def by_head(name: str, **fields: float) -> Loss:
    """A head of po's, on its own."""
    head = HEADS[name](**fields)

    def loss(x: HeadInput, logits_SA: Tensor) -> Tensor:
        found = head(x).loss
        return found if found.dim() == 1 else found.mean(-1)

    return loss


def undetached(x: HeadInput, logits_SA: Tensor) -> Tensor:
    """The mistake: R_beta with the whole beta as the weight of log pi / ref, and differentiated too."""
    gap_G = x.reward_GK.diff(dim=-1)[:, 0]
    logratio_G = x.logratio_GK.diff(dim=-1)[:, 0]
    return -(gap_G - BETA * logratio_G) * logratio_G


def policy_gradient(baseline: Callable[[Tensor], Tensor]) -> Loss:
    """Off-policy policy gradient as if the policy had drawn the arms: -(R_beta - b) log pi, for both arms of a pair."""

    def loss(x: HeadInput, logits_SA: Tensor) -> Tensor:
        b_S = baseline(logits_SA.detach())
        weight_GK = (
            x.reward_GK - BETA * x.logratio_GK.detach() - b_S.repeat_interleave(len(x.reward_GK) // len(b_S))[:, None]
        )
        return -(weight_GK * x.seg.sum(x.policy_T)).sum(-1)

    return loss


@dataclass(frozen=True)
class Method:
    """A loss of pairs. labelled: it sees which arm a Bradley-Terry judge preferred, and no rewards."""

    loss: Loss
    labelled: bool = False


def methods() -> Mapping[str, Method]:
    """The paper's five, with the mistake beside CoPG and the right baseline beside the paper's."""
    return {
        "CoPG": Method(by_head("copg", beta=BETA)),
        "CoPG, mis-scaled beta": Method(undetached),
        "IPO": Method(by_head("ipo", tau=BETA), labelled=True),
        "PG, b = 0": Method(policy_gradient(lambda logits_SA: torch.zeros(len(logits_SA), dtype=F64))),
        "PG, b = E[R]": Method(policy_gradient(lambda logits_SA: logits_SA.softmax(-1) @ REWARD_A)),
        "PG, b = E[R_beta]": Method(policy_gradient(objective)),
    }


def dataset(seeds: int, labelled: bool) -> Tensor:
    """10,000 pairs for each seed; labelled: the arm that sigma(R - R') chose stands first. (S, PAIRS, 2)"""
    made = []
    for seed in range(seeds):
        rng = torch.Generator().manual_seed(seed)
        arms_P2 = torch.stack([p_A.multinomial(PAIRS, True, generator=rng) for p_A in DRAWN_2A], -1)
        if labelled:
            gap_P = REWARD_A[arms_P2[:, 0]] - REWARD_A[arms_P2[:, 1]]
            lost_P = torch.rand(PAIRS, generator=rng, dtype=F64) >= gap_P.sigmoid()
            arms_P2 = torch.where(lost_P[:, None], arms_P2.flip(-1), arms_P2)
        made.append(arms_P2)
    return torch.stack(made)


def train(method: Method, seeds: int, epochs: int, look: Callable[[int, Tensor], None], rate: float = RATE) -> Tensor:
    """Adam over reshuffled epochs, from pi = ref; look(steps done, logits) at the start and after each epoch. (S, A)"""
    data_SP2 = dataset(seeds, method.labelled)
    logits_SA = torch.zeros(seeds, ARMS, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logits_SA], lr=rate)  # elementwise: each seed is a run of its own
    rngs = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    done = 0
    look(done, logits_SA.detach().clone())
    for _ in range(epochs):
        order_SP = torch.stack([torch.randperm(PAIRS, generator=rng) for rng in rngs])
        for at_SB in order_SP.split(BATCH, dim=1):
            arms_SB2 = data_SP2[torch.arange(seeds)[:, None], at_SB]
            optimizer.zero_grad()
            (method.loss(pairs(arms_SB2, logits_SA), logits_SA).sum() / at_SB.shape[1]).backward()
            optimizer.step()
            done += 1
        look(done, logits_SA.detach().clone())
    return logits_SA.detach()


def expected_gradient(method: Method, logits_A: Tensor) -> Tensor:
    """The gradient of the loss over all pairs that can be drawn, by their probabilities. (A,)"""
    arms_P2 = torch.cartesian_prod(torch.arange(ARMS), torch.arange(ARMS))
    chance_P = DRAWN_2A[0][arms_P2[:, 0]] * DRAWN_2A[1][arms_P2[:, 1]]
    if method.labelled:
        first_P = (REWARD_A[arms_P2[:, 0]] - REWARD_A[arms_P2[:, 1]]).sigmoid()
        arms_P2, chance_P = (
            torch.cat([arms_P2, arms_P2.flip(-1)]),
            torch.cat([chance_P * first_P, chance_P * (1 - first_P)]),
        )
    logits_SA = logits_A.detach()[None].clone().requires_grad_(True)
    (method.loss(pairs(arms_P2[None], logits_SA), logits_SA) * chance_P).sum().backward()
    assert logits_SA.grad is not None
    return logits_SA.grad[0]


def fixed_point(method: Method, tolerance: float = 1e-9, most: int = 20_000) -> Tensor:
    """Where plain descent along the expected gradient, from pi = ref, comes to rest. (A,)"""
    logits_A = torch.zeros(ARMS, dtype=F64)
    for _ in range(most):
        step_A = expected_gradient(method, logits_A)
        if step_A.abs().max() < tolerance:
            return logits_A
        logits_A = logits_A - 0.4 * step_A
    raise ArithmeticError(f"the expected gradient is still {step_A.abs().max():.1e} after {most} steps")


def largest_pair_gradient(method: Method, logits_A: Tensor) -> float:
    """The largest entry of the gradient of any single pair's loss. 0 at pi*: the method has no noise there."""
    found = 0.0
    for arms_2 in torch.cartesian_prod(torch.arange(ARMS), torch.arange(ARMS)):
        logits_SA = logits_A.detach()[None].clone().requires_grad_(True)
        (slope_SA,) = torch.autograd.grad(method.loss(pairs(arms_2[None, None], logits_SA), logits_SA).sum(), logits_SA)
        found = max(found, slope_SA.abs().max().item())
    return found

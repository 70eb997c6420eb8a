"""ComPO: zeroth-order steps on the output layer, from comparisons of log-probs alone. Pure functions of tensors.

Paper: Chen et al. 2025, ComPO: Preference Alignment via Comparison Oracles, arXiv:2505.05465.

    z_i uniform on the unit sphere, i <= m
    y_i = -1 if theta + r z_i raises log pi(y_w) and lowers log pi(y_l), else +1;    p = share of y_i = -1
    g = sum_i y_i z_i / ||sum_i y_i z_i||, entries with |g_j| < lambda_g set to 0
    theta <- theta - gamma p g    if p > lambda, else theta

Symbols: theta the output layer's weight; y_w the better response of the pair, y_l the worse; r `radius`; m
    `directions`; lambda `threshold`. `sampling`: how z is drawn: `sphere` (the paper), or `gaussian`, every entry
    standard normal: then r counts per entry, and the radius is r times the square root of the number of entries.
Which of them: the authors' code draws gaussian directions with the r of the paper's table. For Mistral-7B (131 million
    entries) that is a radius of 5.7, ten thousand times the paper's r = 0.0005.
Departures: the change of a log-prob is computed as such. Taken as the difference of two log-probs in fp32 it would be
    rounding error for r = 0.0005 on the sphere of a large model. The authors' code also takes only pairs whose better
    response the model already prefers, and drops an update where 5 steps along -g would not satisfy the oracle; the
    paper has neither.
Unverified: gamma (the paper gives 0.1 to 1; the default is ours).
Verified: one step in numbers; the oracle against two whole forwards in float64. The authors' code was read, not run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from po.errors import UserError
from po.scores import Shape

_ROWS = 512  # positions whose logits are compared at once


@dataclass(frozen=True)
class ComPO:
    """The paper's settings for Mistral-7B; for Llama-3-8B and Gemma-2-9B r = 0.00075, m = 1800, lambda_g = 0.00008."""

    radius: float = 0.0005
    directions: int = 1600
    lambda_g: float = 0.00022
    threshold: float = 0.2
    gamma: float = 1.0
    sampling: Literal["sphere", "gaussian"] = "sphere"
    noisy: float = 3.0  # the largest reference margin of a noisy pair, in nats
    pairs: int = 100  # the first so many noisy pairs make a step each

    def __post_init__(self) -> None:
        for name in ("radius", "directions", "gamma", "pairs"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name}: expected a number above 0, got {getattr(self, name)}")
        for name, most in (("lambda_g", 1.0), ("threshold", 1.0), ("noisy", torch.inf)):
            if not 0 <= getattr(self, name) < most:
                option = name.replace("_", "-")
                raise UserError(f"--{option}: expected from 0 to below {most:g}, got {getattr(self, name)}")


class Step(NamedTuple):
    """What the comparisons of one pair gave. update: what to add to theta, None where too few of them were good."""

    share: float  # p
    update: Tensor | None
    kept: float  # share of g's entries that lambda_g left


def direction(like: Tensor, seed: int, sampling: str) -> Tensor:
    """z for a seed, fp32, in the shape and on the device of `like`. CPU and GPU draw different numbers."""
    generator = torch.Generator(like.device).manual_seed(seed)
    z = torch.randn(like.shape, generator=generator, device=like.device)
    return z if sampling == "gaussian" else z.div_(torch.linalg.vector_norm(z))


def seed_of(*parts: object) -> int:
    """A seed for each direction of each pair, unrelated for neighbours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def update(total: Tensor, share: float, lambda_g: float, threshold: float, gamma: float) -> Step:
    """The step for total = sum_i y_i z_i, of which the share p has y_i = -1. Writes on `total`."""
    norm = torch.linalg.vector_norm(total)
    g = total.div_(norm) if norm > 0 else total
    g = torch.where(g.abs() < lambda_g, 0, g)
    kept = (g != 0).float().mean().item()
    return Step(share, -gamma * share * g if share > threshold else None, kept)


def estimate(theta_VD: Tensor, better: Callable[[Tensor, float], bool], how: ComPO, seed: object) -> Step:
    """One pair's step. better: whether adding a direction times r to theta raises log pi(y_w) and lowers log pi(y_l).

    One direction is held at a time: with theta and their sum, three tensors of the output layer's size.
    """
    total_VD, good = torch.zeros_like(theta_VD), 0
    for i in range(how.directions):
        z_VD = direction(theta_VD, seed_of(seed, i), how.sampling)
        y = -1 if better(z_VD, how.radius) else 1
        good += y < 0
        total_VD.add_(z_VD, alpha=y)
    return update(total_VD, good / how.directions, how.lambda_g, how.threshold, how.gamma)


class Oracle:
    """A pair at the hidden states of its response tokens, which do not depend on the output layer.

    Holds softmax(logits) of the T tokens, (T, V) in fp32, and twice that where logits are soft-capped. From there

        log pi'(t) - log pi(t) = d(t) - log(1 + sum_v pi(v) (e^d(v) - 1))

    for logits that change by d: precise for however small a change. With a cap, tanh's addition theorem gives d.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        target_T: Tensor,
        worse_T: Tensor,
        theta_VD: Tensor,
        bias_V: Tensor | None,
        shape: Shape,
    ) -> None:
        """worse_T: bool, whether a token is y_l's. All in one dtype, fp32 or float64."""
        self.hidden_TD, self.target_T, self.worse_T, self.shape = hidden_TD, target_T, worse_T, shape
        prob, tanh = [], []
        for h in hidden_TD.split(_ROWS):
            logits = shape.logits(torch.nn.functional.linear(h, theta_VD, bias_V))
            prob.append(logits.softmax(-1))
            tanh += [] if shape.softcap is None else [logits / shape.softcap]
        self._prob, self._tanh = prob, tanh

    def changes(self, delta_VD: Tensor, times: float = 1.0) -> tuple[float, float]:
        """By how much theta + times delta changes log pi(y_w) and log pi(y_l), in nats."""
        change_T = torch.cat([self._change(i, delta_VD, times) for i in range(len(self._prob))]).double()
        return change_T[~self.worse_T].sum().item(), change_T[self.worse_T].sum().item()

    def better(self, delta_VD: Tensor, times: float = 1.0) -> bool:
        """Whether it raises the one and lowers the other."""
        chosen, rejected = self.changes(delta_VD, times)
        return chosen > 0 and rejected < 0

    def _change(self, i: int, delta_VD: Tensor, times: float) -> Tensor:
        rows = slice(i * _ROWS, (i + 1) * _ROWS)
        d_TV = (self.hidden_TD[rows] @ delta_VD.T) * (times * self.shape.scale)
        if self.shape.softcap is not None:
            tanh, step = self._tanh[i], (d_TV / self.shape.softcap).tanh()
            d_TV = self.shape.softcap * step * (1 - tanh * tanh) / (1 + tanh * step)
        own_T = d_TV.gather(-1, self.target_T[rows, None])[:, 0]
        return own_T - torch.log1p((self._prob[i] * torch.expm1(d_TV)).sum(-1))

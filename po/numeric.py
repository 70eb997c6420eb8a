"""What heads share: masked arithmetic over the last axis, with finite gradients where the mask is False, and more."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

_NEG = -1e30  # finite, so that 0 * _NEG stays 0 and no NaN enters the backward pass


def masked_softmax(x: Tensor, where: Tensor, sharpness: float = 1.0) -> Tensor:
    """Softmax of sharpness * x over the True entries of the last axis; 0 elsewhere (all 0 where nothing is True).

    The largest entry comes off before the product, so a huge sharpness ends in a one-hot (ties share) and not in NaN.
    """
    top = torch.where(where, x, _NEG).amax(-1, keepdim=True)
    return torch.where(where, sharpness * (x - top), _NEG).softmax(-1) * where


def masked_log_softmax(x: Tensor, where: Tensor) -> Tensor:
    """Log-softmax over the True entries of the last axis; 0 elsewhere, so that p * log p stays 0 there."""
    return torch.where(where, torch.where(where, x, _NEG).log_softmax(-1), 0)


def masked_logsumexp(x: Tensor, where: Tensor) -> Tensor:
    """Log of the summed exponentials of the True entries of the last axis; very negative where nothing is True."""
    return torch.where(where, x, _NEG).logsumexp(-1)


def masked_mean(x: Tensor, where: Tensor) -> Tensor:
    """Mean of the True entries of the last axis; 0 where nothing is True."""
    return torch.where(where, x, 0).sum(-1) / where.sum(-1).clamp(min=1)


def masked_center(x: Tensor, where: Tensor) -> Tensor:
    """The True entries of the last axis minus their mean; 0 elsewhere.

    The smallest entry comes off first: equal entries give exactly 0, and the smallest is never above the mean, whatever
    the rounding of the mean.
    """
    least = torch.where(where, x, torch.inf).amin(-1, keepdim=True)
    above = torch.where(where, x - least, 0)
    return torch.where(where, above - masked_mean(above, where)[..., None], 0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate and with finite gradients at both ends: x near 0 and x very negative."""
    near = x > -math.log(2)
    small = (-torch.expm1(torch.where(near, x, -1.0))).log()
    return torch.where(near, small, torch.log1p(-torch.where(near, -1.0, x).exp()))


def capped_exp(x: Tensor) -> Tensor:
    """e^x, constant (1e13, no gradient) from x = 30 on: fp32 holds it, its gradient and the square of its gradient."""
    return x.clamp(max=30).exp()


def masked_var(x: Tensor, where: Tensor) -> Tensor:
    """Unbiased variance of the True entries of the last axis; 0 where fewer than two are True."""
    return masked_center(x, where).square().sum(-1) / (where.sum(-1) - 1).clamp(min=1)


def masked_std(x: Tensor, where: Tensor) -> Tensor:
    """Square root of masked_var, with gradient 0 where the entries are equal."""
    var = masked_var(x, where)
    return torch.where(var > 0, torch.where(var > 0, var, 1).sqrt(), 0)


def hashed_uniform(key: Tensor) -> Tensor:
    """A number in (0, 1) for each whole number: the same one every time, and unrelated for neighbours (lowbias32)."""
    x = key & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) >> 9).float().add(0.5) / 2**23


def importance_ratio(logp: Tensor, old: Tensor) -> Tensor:
    """pi / mu from log-probs of tokens or of whole responses; the difference is kept within +-20, where the gradient
    ends."""
    return (logp - old).clamp(-20, 20).exp()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's loss, -min(ratio A, clip(ratio, 1 - low, 1 + high) A), elementwise."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clip_ended(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """1 where the clip of clipped_surrogate has ended the gradient, else 0; of negative advantages, of positive."""
    below, above = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)
    return below.to(ratio.dtype), above.to(ratio.dtype)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """Schulman's estimate of KL(pi || ref) at samples of pi: ref/pi - log(ref/pi) - 1, never negative; the log-ratio is
    kept within +-20."""
    x = (ref - logp).clamp(-20, 20)
    return x.expm1() - x


def group_advantages(
    reward: Tensor, where: Tensor, scale: Literal["population", "unbiased", "none"], eps: float = 0.0
) -> Tensor:
    """Rewards minus their mean over the True entries of the last axis, over their standard deviation + eps; 0 where all
    are equal and where nothing is True. population: the deviation divides by n, unbiased: by n - 1, none: no scale."""
    center = masked_center(reward, where)
    if scale == "none":
        return center
    std = masked_std(reward, where)
    if scale == "population":
        n = where.sum(-1).clamp(min=1)
        std = std * ((n - 1) / n).sqrt()
    some = std > 0
    return center / (torch.where(some, std, 1) + eps)[..., None] * some[..., None]


def leave_one_out(x: Tensor, where: Tensor) -> Tensor:
    """Each True entry minus the mean of the other True entries of the last axis; a single one keeps its value, 0
    elsewhere."""
    n = where.sum(-1, keepdim=True)
    others = masked_center(x, where) * n / (n - 1).clamp(min=1)
    return torch.where(n > 1, others, torch.where(where, x, 0))


def later_sums(x_T: Tensor, slot_T: Tensor, decay: float = 1.0) -> Tensor:
    """x_t + decay x_{t+1} + decay^2 x_{t+2} + ... to the end of the response that owns t, whose tokens stand together.
    By doubling: after n rounds each sum reaches 2^n tokens far; decay never has a negative exponent."""
    span = 1
    while span < x_T.numel():
        ahead_T = torch.where(slot_T[span:] == slot_T[:-span], decay**span * x_T[span:], 0)
        x_T = x_T + torch.cat([ahead_T, torch.zeros_like(x_T[:span])])
        span *= 2
    return x_T


def whiten(x: Tensor, where: Tensor, unbiased: bool = False) -> Tensor:
    """The True entries of the last axis at mean 0 and variance 1, which is taken as at least 1e-8; 0 elsewhere."""
    center = masked_center(x, where)
    n = where.sum(-1, keepdim=True)
    var = center.square().sum(-1, keepdim=True) / (n - int(unbiased)).clamp(min=1)
    return center * var.clamp(min=1e-8).rsqrt()


class Value(nn.Module):
    """Hidden states (T, L, D) -> {"value": (T,)}, from the last layer, which it does not train."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_TLD: Tensor) -> dict[str, Tensor]:
        last_TD = hidden_TLD[:, -1].detach().to(self.linear.weight.dtype)
        return {"value": self.linear(last_TD).squeeze(-1)}

"""Masked arithmetic over the last axis, with finite gradients where the mask is False. What heads share."""

from __future__ import annotations

import torch
from torch import Tensor

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

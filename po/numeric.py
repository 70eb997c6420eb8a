"""Masked arithmetic over the last axis, with finite gradients where the mask is False. What heads share."""

from __future__ import annotations

import torch
from torch import Tensor

_NEG = -1e30  # finite, so that 0 * _NEG stays 0 and no NaN enters the backward pass


def masked_softmax(x: Tensor, where: Tensor) -> Tensor:
    """Softmax over the True entries of the last axis; 0 elsewhere (all 0 where nothing is True)."""
    return torch.where(where, x, _NEG).softmax(-1) * where


def masked_log_softmax(x: Tensor, where: Tensor) -> Tensor:
    """Log-softmax over the True entries of the last axis; 0 elsewhere, so that p * log p stays 0 there."""
    return torch.where(where, torch.where(where, x, _NEG).log_softmax(-1), 0)


def masked_logsumexp(x: Tensor, where: Tensor) -> Tensor:
    """Log of the summed exponentials of the True entries of the last axis; very negative where nothing is True."""
    return torch.where(where, x, _NEG).logsumexp(-1)


def masked_mean(x: Tensor, where: Tensor) -> Tensor:
    """Mean of the True entries of the last axis; 0 where nothing is True."""
    return torch.where(where, x, 0).sum(-1) / where.sum(-1).clamp(min=1)

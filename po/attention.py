"""The packed stream's attention, registered with transformers under the name "po_forest".

A model whose attention is set to it takes `forest=...` as one more keyword of its forward, which transformers hands
down to every attention layer. Without it (generation, plain forwards) the same model attends as usual: SDPA, or
explicit arithmetic where scores are soft-capped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from po.errors import NumericsError, UserError
from po.forest import Forest
from po.kernels import bias, dense, explicit, flex, sliced

NAME = "po_forest"
Backend = Literal["sliced", "flex", "dense"]


@dataclass
class Seen:
    """What the attention of a model met: per layer that a forest reached, the sliding window it was given; and the
    windows of the masks that transformers built for plain forwards."""

    layers: dict[int, int | None] = field(default_factory=dict)
    mask_windows: set[int] = field(default_factory=set)


_BACKENDS = {"sliced": sliced, "flex": flex, "dense": dense}
_forced: Backend | None = None
_seen = Seen()


def backend(device: torch.device) -> Backend:
    """Which implementation attends on a device."""
    return _forced or ("flex" if device.type == "cuda" else "sliced")


@contextmanager
def using(name: Backend) -> Iterator[None]:
    """Attend with one backend whatever the device, the backward pass of gradient checkpointing included."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def watch() -> Iterator[Seen]:
    """What attention meets meanwhile, in this and in nested `watch`es."""
    global _seen
    before, _seen = _seen, Seen()
    try:
        yield _seen
    finally:
        before.layers |= _seen.layers
        before.mask_windows |= _seen.mask_windows
        _seen = before


def no_mask(device: torch.device) -> Tensor:
    """What to pass as attention_mask beside `forest`: transformers' mask builders hand a 4-D mask through untouched,
    and one without elements cannot be used by mistake. (1, 1, 0, 0) bool"""
    return torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=device)


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, S, Dk), key (B, Hk, S, Dk), value (B, Hk, S, Dv) -> (B, S, H, Dv).

    With a forest B is 1 and the mask is ignored. Raises UserError for attention that it cannot compute, and
    NumericsError where the model lost the forest on the way here.
    """
    if kwargs.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__} has attention sinks, which po's attention does not compute")
    if forest is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise NumericsError(dropped(module))
        return _ordinary(module, query, key, value, attention_mask, scaling, dropout, softcap, **kwargs)
    _refuse(module, dropout, kwargs)
    _seen.layers[getattr(module, "layer_idx", len(_seen.layers))] = sliding_window
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window is not None and sliding_window < forest.longest else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _BACKENDS[backend(query.device)](query, key, value, forest, window, softcap, scale)
    return out.transpose(1, 2).contiguous(), None


def dropped(module: nn.Module) -> str:
    """The message for a model that does not hand the forest down to its attention."""
    return (
        f"{type(module).__name__}: the packed stream did not reach the attention layers, because the model's code does "
        "not hand its keyword arguments down to them. Set model.share_prefix: false"
    )


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout > 0:
        raise UserError(
            f"{name}: attention dropout {dropout} while scoring responses; expected 0. Log-probs under dropout are "
            "noise to a preference loss: set the config's attention dropout to 0"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UserError(f"{name}: attention is not causal; po scores causal language models only")
    if kwargs.get("position_bias") is not None:
        raise UserError(f"{name} adds a position bias to its attention scores. Set model.share_prefix: false")


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a plain forward or of generation."""
    if softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    _refuse(module, dropout, kwargs)
    n, scale = query.shape[2], query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is None:
        if n > 1:
            key, value = key[:, :, :n], value[:, :, :n]
        mask = torch.ones(n, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril() if n > 1 else mask
    return explicit(query, key, value, bias(mask, query.dtype), scale, softcap).transpose(1, 2).contiguous(), None


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of a plain forward, as transformers builds it for SDPA."""
    if local_size is not None:
        _seen.mask_windows.add(local_size)
    mask: Tensor | None = sdpa_mask(*args, local_size=local_size, **kwargs)
    return mask


AttentionInterface.register(NAME, forest_attention)
AttentionMaskInterface.register(NAME, _mask)

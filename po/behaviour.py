"""What policy-gradient heads know of the policy that sampled: log-probs, gates, and how exact its sampler was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from po.batch import Batch
from po.spec import Correction


def with_behaviour(batch: Batch, logp_T: Tensor, gates: Mapping[str, Tensor] | None) -> Batch:
    """The batch with the log-probs and gates of the policy that sampled it, where it does not bring them: responses
    that the very same weights sampled have those of the forward at hand. Rows from a file bring their log-probs, and
    their gates are taken as they are now."""
    old_T = batch.old_T
    if old_T is None and batch.sampler_T is not None:
        old_T = logp_T.detach()
        if batch.from_privileged:  # heads look at their own tokens
            assert batch.own_T is not None
            assert batch.privileged_T is not None
            old_T = old_T.index_copy(0, batch.own_T, old_T[batch.privileged_T])
    return replace(batch, old_T=old_T, old_gates=batch.old_gates or {k: g.detach() for k, g in (gates or {}).items()})


def correction(batch: Batch, kind: Correction, cap: float) -> Tensor | None:
    """min(pi_old / sampler, cap) for each token of the heads' responses, of the token itself or of its whole response:
    truncated importance weights against a sampler whose arithmetic is not the trainer's (Yao et al. 2025). Ones where
    the recipe asks for none; None for a batch without tokens or without log-probs of who sampled it. (T,)"""
    if batch.old_T is None or not len(batch.old_T):
        return None
    old_T = batch.own(batch.old_T)
    if kind == "none" or batch.sampler_T is None:
        return torch.ones_like(old_T)
    gap_T = _gap(old_T, batch.own(batch.sampler_T))
    if kind == "sequence":
        gap_T = batch.seg.spread(batch.seg.sum(gap_T))
    return gap_T.clamp(max=20).exp().clamp(max=cap)


def _gap(old_T: Tensor, sampler_T: Tensor) -> Tensor:
    """0 at tokens that no sampler wrote (NaN)."""
    return torch.where(sampler_T.isnan(), 0, old_T - sampler_T)


def sampling_metrics(batch: Batch) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """How far the sampler's own log-probs are from the trainer's; TRL's name."""
    if batch.sampler_T is not None and batch.old_T is not None:
        gap_T = _gap(batch.old_T, batch.sampler_T).abs()
        counts_T = batch.own(~batch.sampler_T.isnan()) & batch.seg.spread(batch.seg.valid_GK)
        yield "sampling/sampling_logp_difference/mean", batch.own(gap_T), counts_T

"""Checks of the numbers on a run's first batch, before anything is learnt from it."""

from __future__ import annotations

import torch
from torch import nn

from po.batch import Batch
from po.forward import Forward, evaluating
from po.reference import check_start
from po.sharing import verify


@torch.no_grad()
def check_first(model: nn.Module, batch: Batch, forward: Forward, dtype: torch.dtype, starts: bool) -> float | None:
    """The packing equals a plain forward, and a policy that `starts` at its reference is there; NumericsError
    otherwise. Returns how far it is from it, None where it starts elsewhere. dtype: of the forward."""
    with evaluating(model):
        verify(model, batch.pieces[0].stream if batch.pieces else batch.stream)
        if not starts:
            return None
        seen = forward(model, batch)
        assert seen.batch.ref_T is not None
        return check_start(batch.own(seen.logp_T), batch.own(seen.batch.ref_T), batch, dtype)

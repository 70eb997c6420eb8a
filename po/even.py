"""As many forwards on every rank: under ZeRO-3 they gather weights together, and a rank with one more would hang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from po.batch import Batch
from po.pieces import Piece
from po.ranks import gather


def even(batches: Sequence[Batch]) -> list[Batch]:
    """The same micro-batches, each with as many pieces as on the rank where it has most. All ranks at once."""
    most = [max(n) for n in zip(*gather([len(b.pieces) for b in batches]), strict=True)]
    return [_with_pieces(b, n) for b, n in zip(batches, most, strict=True)]


def _with_pieces(batch: Batch, n: int) -> Batch:
    """The batch in n pieces, idle ones behind; n = 0: whole, as it is."""
    if n == 0:
        return batch
    own = batch.pieces or (Piece(batch.stream, torch.arange(batch.stream.target_T.numel())),)
    return replace(batch, pieces=own + (replace(own[-1], idle=True),) * (n - len(own)))

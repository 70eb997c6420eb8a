"""A micro-batch in several streams, where one would be too much for memory: sets of many responses, split between them.

A loss over a whole set needs all its log-probs at once, but not all their graphs (po/whole.py). So the responses of a
group may be scored in several forwards, each with the prompt in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from po.forest import Forest, Group, Padded

Chosen = list[tuple[int, list[int]]]  # groups and which of their responses


@dataclass(frozen=True)
class Piece:
    """One of the streams, and where its response tokens stand in the whole batch's order: int64 (t,)."""

    stream: Forest | Padded
    index_T: Tensor
    idle: bool = (
        False  # stands in for the piece that another rank has here: its collectives run, its numbers do not count
    )


def split(
    groups: Sequence[Group], limit: int, K: int, lay: Callable[[Sequence[Group], int], Forest | Padded]
) -> tuple[Piece, ...]:
    """Streams of at most `limit` tokens each, prompts and responses counted; (): one stream holds everything. A prompt
    with a single response that is longer has a stream of its own."""
    chosen = _fill(groups, limit)
    if len(chosen) < 2:
        return ()
    lengths = [len(r) for _, responses in groups for r in responses]
    start = [0, *accumulate(lengths)]
    first = [0, *accumulate(len(responses) for _, responses in groups)]
    pieces = []
    for part in chosen:
        stream = lay([(groups[g][0], [groups[g][1][k] for k in ks]) for g, ks in part], K)
        at = [first[g] + k for g, ks in part for k in ks]
        pieces.append(Piece(stream, torch.cat([torch.arange(start[i], start[i + 1]) for i in at])))
    return tuple(pieces)


def _fill(groups: Sequence[Group], limit: int) -> list[Chosen]:
    """Responses in order, a new piece whenever the next one does not fit."""
    pieces: list[Chosen] = [[]]
    size = 0
    for g, (prompt, responses) in enumerate(groups):
        for k, r in enumerate(responses):
            here = pieces[-1] and pieces[-1][-1][0] == g
            cost = len(r) + (0 if here else len(prompt))
            if pieces[-1] and size + cost > limit:
                pieces.append([])
                here, size, cost = False, 0, len(r) + len(prompt)
            if not here:
                pieces[-1].append((g, []))
            pieces[-1][-1][1].append(k)
            size += cost
    return pieces

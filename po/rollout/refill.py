"""Which other prompts are sampled in the place of groups that say nothing: the same ones on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain

import torch

from po.ranks import gather
from po.rollout.draw import Place
from po.rollout.written import Written

_BEHIND = 1_000_000_000  # the places of further prompts: behind all others of a round


def refill(
    flat: Sequence[Place],
    reserve: list[Place],
    budget: int,
    written: Callable[[Sequence[Place]], dict[Place, Written]],
    good: Callable[[Written], bool],
) -> tuple[dict[Place, Written], int]:
    """Groups for places of this rank, and how many were sampled for all ranks.

    flat: this rank's places whose groups say nothing. In turns, each such place of any rank gets a prompt of the
    reserve, in order, until its group is good or reserve or budget are used up. written: samples; every rank calls it
    as often.
    """
    found: dict[Place, Written] = {}
    open_, spent = list(flat), 0
    while True:
        waiting = sorted(chain.from_iterable(gather(open_)))
        turn = dict(zip(waiting[: budget - spent], reserve))
        if not turn:
            return found, spent
        del reserve[: len(turn)]
        spent += len(turn)
        mine = [p for p in open_ if p in turn]
        made = written([turn[p] for p in mine])
        found |= {p: made[turn[p]] for p in mine if good(made[turn[p]])}
        open_ = [p for p in open_ if p not in found]


def reserve_of(number: int, prompts: int, taken: Iterable[Collection[int]], seed: int) -> list[Place]:
    """Further prompts for a round: all that none of its places took, shuffled by seed and round."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
    used = set(chain.from_iterable(taken))
    order = torch.randperm(prompts, generator=rng).tolist()
    return [Place(number, _BEHIND + i, k) for i, k in enumerate(order) if k not in used]

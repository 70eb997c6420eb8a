"""What the ranks of a run tell each other. Without a process group there is one rank, which agrees with itself."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_any(flag: Tensor) -> bool:
    """Whether the 0-dim flag is set on any rank; the same answer on all. Waits for all of them."""
    found = flag.to(torch.int32)
    if ranks() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def gather(mine: _T) -> list[_T]:
    """Every rank's object, in their order, on all of them. Waits for all of them."""
    if ranks() == 1:
        return [mine]
    found: list[_T] = [mine] * ranks()
    dist.all_gather_object(found, mine)
    return found

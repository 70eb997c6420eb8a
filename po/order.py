"""Which rows make which optimizer step: a function of the seed, the epoch and the step alone.

Step s of an epoch takes rows s*B .. (s+1)*B of the epoch's permutation, where B = per-device batch * accumulation *
ranks; so 1 x 4, 4 x 1 and 2 ranks x 2 train on the same rows. The last step of an epoch may have fewer; where a
micro-batch has no row left it gets a filler that counts for nothing, so that all ranks make the same number of calls.

A shuffled run begins with the longest rows of all, so that what does not fit into memory fails in the first minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Sampler

from po.batch import Pick


@dataclass
class StepSampler(Sampler[list[Pick]]):
    """Yields this rank's micro-batches, `accumulation` of them per optimizer step, always."""

    items: int
    per_device: int
    accumulation: int = 1
    world: int = 1
    rank: int = 0
    shuffle: bool = True
    seed: int = 0
    sizes: Sequence[int] = ()  # tokens of each item; () leaves the first step to chance
    epoch: int = field(default=0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def batch_sampler(self) -> StepSampler:
        """Where HF's Trainer looks for set_epoch."""
        return self

    def __len__(self) -> int:
        step = self.per_device * self.accumulation * self.world
        return -(-self.items // step) * self.accumulation

    def order(self) -> list[int]:
        """The epoch's permutation of all items."""
        if not self.shuffle:
            return list(range(self.items))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(self.items, generator=generator).tolist()
        if self.epoch > 0 or not self.sizes:
            return order
        step = self.per_device * self.accumulation * self.world
        longest = sorted(order, key=lambda i: -self.sizes[i])[:step]
        first = set(longest)
        return longest + [i for i in order if i not in first]

    def __iter__(self) -> Iterator[list[Pick]]:
        order, step = self.order(), self.per_device * self.accumulation * self.world
        for start in range(0, self.items, step):
            rows = order[start : start + step]
            for micro in range(self.accumulation):
                at = (micro * self.world + self.rank) * self.per_device
                mine = rows[at : at + self.per_device]
                yield [(i, True) for i in mine] or [(rows[0], False)]


class StepLoader(DataLoader):  # type: ignore[type-arg]
    """A DataLoader over a StepSampler that HF's Trainer and `skip_first_batches` take as it is."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

"""Which prompts are sampled when: the micro-batches of an epoch in rounds, each sampled at once and trained on once or
more. A round is `steps` optimizer steps of `po.order`, so that neither micro-batch size nor ranks decide who is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from po.data.groups import Pick
from po.order import StepSampler


class Micro(NamedTuple):
    """The prompts of a micro-batch. first: the place in the round, over all ranks, of the first of them."""

    picks: tuple[Pick, ...]
    first: int


class Ask(NamedTuple):
    """A micro-batch that is to be trained on, and the round that it belongs to."""

    round: int  # over all epochs
    micro: int  # of the micro-batch in its round
    age: int  # optimizer steps since the round was sampled
    micros: tuple[Micro, ...]  # of this rank, all of the round


@dataclass
class RoundSampler(StepSampler):
    """Yields this rank's micro-batches as asks, one in each list."""

    steps: int = 1  # optimizer steps per round
    iterations: int = 1  # times that a round is trained on

    def __len__(self) -> int:
        return super().__len__() * self.iterations

    def __iter__(self) -> Iterator[list[Any]]:
        size = self.steps * self.accumulation
        rounds = -(-super().__len__() // size)
        micros, number = enumerate(super().__iter__()), self.epoch * rounds
        while chunk := tuple(Micro(tuple(picks), self._first(m % size)) for m, picks in islice(micros, size)):
            for i in range(self.iterations * len(chunk)):
                yield [Ask(number, i % len(chunk), i // self.accumulation, chunk)]
            number += 1

    def _first(self, m: int) -> int:
        return (m * self.world + self.rank) * self.per_device


class Asks(Dataset[Ask]):
    """What a loader over a RoundSampler reads: the asks themselves."""

    def __getitem__(self, ask: Ask) -> Ask:
        return ask


def alone(asks: list[Ask]) -> Ask:
    """The collate function of such a loader."""
    (ask,) = asks
    return ask

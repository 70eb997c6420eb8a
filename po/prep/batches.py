"""The records of a step in batches, the same ones each time they are read, here or in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice

from po.data.read import Record
from po.data.sources import Opened

Batches = Callable[[], Iterator[list[Record]]]  # can be pickled
Batch = int | Callable[[Record], object]  # so many, or adjacent ones of the same key


def records(opened: Sequence[Opened], start: int, limit: int | None) -> Iterator[Record]:
    """The first `limit` records of all sources, from `start` on."""
    return islice((r for one in opened for r in one.records()), start, limit)


def batches(opened: Sequence[Opened], start: int, limit: int | None, batch: Batch) -> Batches:
    """Whole batches. `start` lies between two of them, so that a resumed step makes the same ones."""
    return partial(_batches, opened, start, limit, batch)


def _batches(opened: Sequence[Opened], start: int, limit: int | None, batch: Batch) -> Iterator[list[Record]]:
    found = records(opened, start, limit)
    if isinstance(batch, int):
        return iter(lambda: list(islice(found, batch)), [])
    return (list(same) for _, same in groupby(found, batch))


def fine(batch: list[Record]) -> list[Record]:
    """Those that could be read."""
    return [r for r in batch if r.data is not None]


def worked(every: Batches) -> Batches:
    """Of each batch those that could be read, where there are any."""
    return partial(_worked, every)


def _worked(every: Batches) -> Iterator[list[Record]]:
    return filter(None, map(fine, every()))

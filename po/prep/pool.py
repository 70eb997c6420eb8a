"""Work on items in the order they came, by one process or several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from po.errors import UserError

_CHUNK = 64  # items per task of a worker process
T = TypeVar("T")
R = TypeVar("R")


def in_order(items: Iterator[T], work: Callable[[T], R], num_proc: int) -> Iterator[list[tuple[T, R]]]:
    """Items with what became of them, in groups; only a window of items is in memory."""
    if num_proc < 1:
        raise UserError(f"--num-proc: expected at least 1 process, got {num_proc}")
    if num_proc == 1:
        yield from ([(item, work(item))] for item in items)
        return
    waiting: deque[tuple[list[T], Future[list[R]]]] = deque()
    fork = multiprocessing.get_context("fork")  # the workers inherit the work; it need not be picklable
    with ProcessPoolExecutor(num_proc, fork, _start_worker, (work,)) as pool:
        while (chunk := list(islice(items, _CHUNK))) or waiting:
            if chunk:
                waiting.append((chunk, pool.submit(_work_chunk, chunk)))
            if len(waiting) >= 4 * num_proc or not chunk:
                done, future = waiting.popleft()
                yield list(zip(done, future.result(), strict=True))


_WORKER: list[Callable[[Any], Any]] = []  # of this process, where it is a worker


def _start_worker(work: Callable[[Any], Any]) -> None:
    _WORKER[:] = [work]


def _work_chunk(items: list[Any]) -> list[Any]:
    return [_WORKER[0](item) for item in items]

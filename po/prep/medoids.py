"""k medoids of weighted points: exact for small sets, local search with a certified gap beyond."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ENUMERATED = 20_000  # at most so many subsets are tried one by one
_AT_ONCE = 2048
_ROUNDS = 600  # of the bound's ascent


@dataclass(frozen=True)
class Medoids:
    """The chosen points in rising order, what they cost, and what no choice of as many can cost less than."""

    chosen: tuple[int, ...]
    cost: float
    bound: float
    exact: bool  # every subset was tried

    @property
    def gap(self) -> float:
        """The share of the cost that a better choice could save at most; 0: this is a best one."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0


def distances(points: Sequence[Sequence[float]]) -> Floats:
    """Euclidean, each with each."""
    at_ND = np.asarray(points, dtype=np.float64)
    gap_NN = np.empty((len(at_ND), len(at_ND)))
    for i, one_D in enumerate(at_ND):  # row by row: N x N x D would be large for long embeddings
        gap_NN[i] = np.sqrt(((at_ND - one_D) ** 2).sum(-1))
    return gap_NN


def medoids(distance_NN: Floats, weight_N: Floats, k: int, enumerated: int = ENUMERATED) -> Medoids:
    """The k points S that minimise sum_i weight_i min_(j in S) distance_ij, weights from 0 on.

    Every subset is tried where there are at most `enumerated`; else greedy additions, then the best swap of one point
    until none helps, and a Lagrangian lower bound that says how far from the least cost this can be.
    """
    if not 0 < k <= len(weight_N):
        raise ValueError(f"expected 1 to {len(weight_N)} medoids, got {k}")
    cost_NN = weight_N[:, None] * distance_NN  # point, medoid
    if comb(len(weight_N), k) <= enumerated:
        chosen, cost = _every(cost_NN, k)
        return Medoids(chosen, cost, cost, True)
    chosen, cost = _swaps(cost_NN, _greedy(cost_NN, k))
    return Medoids(chosen, cost, _bound(cost_NN, k, cost), False)


def cost_of(distance_NN: Floats, weight_N: Floats, chosen: Sequence[int]) -> float:
    """sum_i weight_i min_(j in chosen) distance_ij."""
    return float((weight_N * distance_NN[:, list(chosen)].min(-1)).sum())


def _every(cost_NN: Floats, k: int) -> tuple[tuple[int, ...], float]:
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for subset_CK in _batches(len(cost_NN), k):
        cost_C = cost_NN[:, subset_CK].min(-1).sum(0)
        least = int(cost_C.argmin())
        if cost_C[least] < best[0]:
            best = float(cost_C[least]), tuple(map(int, subset_CK[least]))
    return best[1], best[0]


def _batches(n: int, k: int) -> Iterator[NDArray[np.int64]]:
    every = combinations(range(n), k)
    while batch := list(islice(every, _AT_ONCE)):
        yield np.array(batch)


def _greedy(cost_NN: Floats, k: int) -> list[int]:
    chosen: list[int] = []
    near_N = np.full(len(cost_NN), np.inf)
    for _ in range(k):
        total_N = np.minimum(near_N[:, None], cost_NN).sum(0)
        total_N[chosen] = np.inf
        chosen.append(int(total_N.argmin()))
        near_N = np.minimum(near_N, cost_NN[:, chosen[-1]])
    return chosen


def _swaps(cost_NN: Floats, chosen: list[int]) -> tuple[tuple[int, ...], float]:
    cost = float(cost_NN[:, chosen].min(-1).sum())
    while True:
        found = cost * (1 - 1e-12), -1, -1
        for at in range(len(chosen)):
            rest = chosen[:at] + chosen[at + 1 :]
            near_N = cost_NN[:, rest].min(-1) if rest else np.full(len(cost_NN), np.inf)
            total_N = np.minimum(near_N[:, None], cost_NN).sum(0)
            total_N[chosen] = np.inf
            new = int(total_N.argmin())
            if total_N[new] < found[0]:
                found = float(total_N[new]), at, new
        if found[1] < 0:
            return tuple(sorted(chosen)), cost
        cost, chosen[found[1]] = found[0], found[2]


def _bound(cost_NN: Floats, k: int, cost: float) -> float:
    """The best lower bound that subgradient ascent finds on the dual where every point's assignment is relaxed:
    sum_i m_i + the k smallest of sum_i min(0, cost_ij - m_i)."""
    price_N = np.sort(cost_NN, axis=1)[:, min(1, len(cost_NN) - 1)].copy()
    best, best_price_N, size, idle = 0.0, price_N, 1.0, 0
    for _ in range(_ROUNDS):
        saved_NN = np.minimum(0, cost_NN - price_N[:, None])
        total_N = saved_NN.sum(0)
        taken = np.argsort(total_N, kind="stable")[:k]
        bound = float(price_N.sum() + total_N[taken].sum())
        idle += 1
        if bound > best:
            best, best_price_N, idle = bound, price_N, 0
        slope_N = 1.0 - (saved_NN[:, taken] < 0).sum(-1)
        norm = float((slope_N**2).sum())
        if norm == 0 or cost - best <= 1e-9 * cost or size < 1e-6:
            break
        if idle >= 15:
            size, idle, price_N = size / 2, 0, best_price_N
            continue
        price_N = np.maximum(0, price_N + size * (cost - bound) / norm * slope_N)
    return min(best, cost)

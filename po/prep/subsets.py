"""Which negatives of many answers to a prompt are worth training on (AMPO), and how much each answer weighs (MPO).

Gupta et al. 2025, AMPO: Active Multi-Preference Optimization, arXiv:2502.18293: the best answer is the positive, k of
the others are the negatives. Gupta et al. 2024, Multi-Preference Optimization, arXiv:2412.04628: weights by the
deviation from the mean reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from po.prep.medoids import ENUMERATED, Floats, Medoids, distances, medoids

_RESTARTS = 8
_LLOYD = 100


def best_of(rewards: Sequence[float]) -> int:
    """The positive; the first among equals."""
    return max(range(len(rewards)), key=lambda i: rewards[i])


def bottom_k(rewards: Sequence[float], k: int) -> tuple[int, ...]:
    """The k lowest rewards besides the best answer, in rising order of place; the first among equals."""
    others = _others(rewards, k)
    return tuple(sorted(sorted(others, key=lambda i: rewards[i])[:k]))


def coreset(
    rewards: Sequence[float], embeddings: Sequence[Sequence[float]], k: int, seed: bytes = b""
) -> tuple[int, ...]:
    """k-means with k clusters over the others' embeddings; of each cluster the answer with the lowest reward.

    seed: of k-means' starts; of 8 the tightest clusters win. Where fewer than k embeddings differ, the lowest rewards
    fill up.
    """
    others = _others(rewards, k)
    cluster_N = k_means(np.asarray([embeddings[i] for i in others], dtype=np.float64), k, seed)
    groups = [[i for i, c in zip(others, cluster_N) if c == cluster] for cluster in range(k)]
    chosen = lowest_of(rewards, groups)
    left = sorted((i for i in others if i not in chosen), key=lambda i: rewards[i])
    return tuple(sorted([*chosen, *left[: k - len(chosen)]]))


def lowest_of(rewards: Sequence[float], groups: Sequence[Sequence[int]]) -> list[int]:
    """The lowest reward's place in each group that has any."""
    return [min(group, key=lambda i: rewards[i]) for group in groups if group]


def opt_select(
    rewards: Sequence[float], embeddings: Sequence[Sequence[float]], k: int, enumerated: int = ENUMERATED
) -> Medoids:
    """The k others that minimise sum_i exp(mean r - r_i) min_(j chosen) |e_i - e_j|, i over the others.

    Unverified: whether the sum runs over all answers or, as here, over those that are not the positive. The mean is
    over all; another one would only scale the cost. Raises ValueError where a weight is beyond what a float holds.
    """
    others = _others(rewards, k)
    mean = math.fsum(rewards) / len(rewards)
    try:
        weight_N = np.array([math.exp(mean - rewards[i]) for i in others])
    except OverflowError as e:
        raise ValueError("rewards so far apart that exp(mean - reward) is no number; standardise them") from e
    found = medoids(distances([embeddings[i] for i in others]), weight_N, k, enumerated)
    return Medoids(tuple(others[i] for i in found.chosen), found.cost, found.bound, found.exact)


def deviation_weights(
    rewards: Sequence[float], alpha: float = 1.0, power: int = 1, signed: bool = False, standardize: bool = False
) -> list[float]:
    """MPO's exp(alpha |D|^power), D = reward - mean; signed: exp(alpha D^power); standardize: D in units of the group's
    (population) standard deviation, 0 where all are equal. power 0: all weights are 1, whatever alpha.

    Unverified: the weight of the answers below the mean (the paper's summary speaks of both tails, REFA prints the
    signed form), and which power is which W-p. Raises ValueError where a weight is beyond what a float holds.
    """
    if power == 0:
        return [1.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    apart = [r - mean for r in rewards]
    if standardize:
        spread = math.sqrt(math.fsum(d * d for d in apart) / len(apart))
        apart = [d / spread if spread > 0 else 0.0 for d in apart]
    try:
        return [math.exp(alpha * (d if signed else abs(d)) ** power) for d in apart]
    except OverflowError as e:
        raise ValueError("rewards so far apart that their weight is no number; standardise them") from e


def without_median(rewards: Sequence[float]) -> tuple[int, ...]:
    """All places but that of the (lower) median reward: MPO's recipe for samples of its own policy."""
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    return tuple(i for i in range(len(rewards)) if i != order[(len(rewards) - 1) // 2])


def k_means(at_ND: Floats, k: int, seed: bytes) -> NDArray[np.int64]:
    """A cluster for each point: k-means++ starts, Lloyd's steps, the tightest of several runs, drawn by the seed."""
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))
    runs = [_lloyd(at_ND, _starts(at_ND, k, generator)) for _ in range(_RESTARTS)]
    return min(runs, key=lambda run: run[0])[1]


def _starts(at_ND: Floats, k: int, generator: np.random.Generator) -> Floats:
    chosen = [int(generator.integers(len(at_ND)))]
    near_N = ((at_ND - at_ND[chosen[0]]) ** 2).sum(-1)
    while len(chosen) < k:
        total = float(near_N.sum())
        if total == 0:  # no further point differs: empty clusters
            break
        drawn = int(np.searchsorted(np.cumsum(near_N), generator.random() * total, side="right"))
        chosen.append(min(drawn, int(near_N.nonzero()[0][-1])))
        near_N = np.minimum(near_N, ((at_ND - at_ND[chosen[-1]]) ** 2).sum(-1))
    return at_ND[chosen].copy()


def _lloyd(at_ND: Floats, center_KD: Floats) -> tuple[float, NDArray[np.int64]]:
    before: NDArray[np.int64] | None = None
    for _ in range(_LLOYD):
        far_NK = ((at_ND[:, None] - center_KD[None]) ** 2).sum(-1)
        cluster_N = far_NK.argmin(-1)
        if before is not None and (cluster_N == before).all():
            break
        before = cluster_N
        for cluster in range(len(center_KD)):
            if (cluster_N == cluster).any():
                center_KD[cluster] = at_ND[cluster_N == cluster].mean(0)
    return float(far_NK.min(-1).sum()), cluster_N


def _others(rewards: Sequence[float], k: int) -> list[int]:
    if not 0 < k < len(rewards):
        raise ValueError(f"{k} negatives of {len(rewards)} answers: expected 1 to one less than there are answers")
    best = best_of(rewards)
    return [i for i in range(len(rewards)) if i != best]

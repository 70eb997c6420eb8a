"""Completing comparisons that are partly missing and partly wrong (CURATRON's problem), and the ranking they give.

Nguyen et al. 2024, CURATRON: Complete (and) Robust Preference Data for Robust Alignment of Large Language Models,
arXiv:2403.02745. Unverified algorithm: only the paper's abstract and headings were seen. This one is derived: under
Bradley-Terry-Luce the logits log(p_ij / p_ji) = w_i - w_j are a skew-symmetric matrix of rank 2, so what is missing or
wrong in few places is found as a low-rank matrix plus a sparse one (principal component pursuit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Method = Literal["low_rank", "least_absolute"]
CLIP = 0.01  # probabilities are taken as at least this and at most 1 less it, so that logits are finite
_ROUNDS = 2000


@dataclass(frozen=True)
class Completed:
    """All comparisons, mended: probability_NN[i, j] that i is better than j, a score of each (higher is better)."""

    probability_NN: Floats
    score_N: Floats
    corrupted_NN: NDArray[np.bool_]  # observed, and further off than `tolerance` in logits
    flipped_NN: NDArray[np.bool_]  # observed, and on the other side of 1/2
    filled_NN: NDArray[np.bool_]  # not observed
    rounds: int


def complete(
    probability_NN: Floats, method: Method = "low_rank", clip: float = CLIP, tolerance: float = 1.0
) -> Completed:
    """p_ij of item i being better than j, NaN where they were not compared; one of p_ij and p_ji is enough.

    low_rank: `pursue`. least_absolute: the scores w that minimise the sum of |logit_ij - (w_i - w_j)| over what was
    observed, which trusts Bradley-Terry-Luce to the letter and so needs fewer comparisons.

    Raises ValueError where the comparisons do not connect all items, so that nothing orders them.
    """
    logit_NN, seen_NN = observed_logits(probability_NN, clip)
    if not connected(seen_NN):
        raise ValueError("the comparisons fall into parts that nothing connects")
    low_NN, rounds = (pursue if method == "low_rank" else least_absolute)(logit_NN, seen_NN)
    off_NN = seen_NN & (np.abs(logit_NN - low_NN) > tolerance)
    flipped_NN = seen_NN & (np.sign(low_NN) * np.sign(logit_NN) < 0)
    unknown_NN = ~seen_NN & ~np.eye(len(low_NN), dtype=bool)
    probability = 1 / (1 + np.exp(-low_NN))
    return Completed(probability, low_NN.mean(-1), off_NN, flipped_NN, unknown_NN, rounds)


def observed_logits(probability_NN: Floats, clip: float = CLIP) -> tuple[Floats, NDArray[np.bool_]]:
    """Skew-symmetric logits of the clipped probabilities (0 where not observed), and where they were observed. Where
    both p_ij and 1 - p_ji are there, their mean counts."""
    given_NN = np.asarray(probability_NN, dtype=np.float64)
    both_NN = np.stack([given_NN, 1 - given_NN.T])
    there_NN = ~np.isnan(both_NN)
    seen_NN = there_NN.any(0) & ~np.eye(len(given_NN), dtype=bool)
    p_NN = np.where(there_NN, both_NN, 0).sum(0) / np.maximum(there_NN.sum(0), 1)
    p_NN = np.clip(np.where(seen_NN, p_NN, 0.5), clip, 1 - clip)
    return np.log(p_NN) - np.log1p(-p_NN), seen_NN


def borda(logit_NN: Floats, seen_NN: NDArray[np.bool_]) -> Floats:
    """What a reader without repair would rank by: the mean logit over the comparisons that were made."""
    return np.asarray(logit_NN.sum(-1) / np.maximum(seen_NN.sum(-1), 1))


def connected(seen_NN: NDArray[np.bool_]) -> bool:
    """Whether every item can be reached from every other over comparisons."""
    reached = np.zeros(len(seen_NN), dtype=bool)
    reached[:1] = True
    while True:
        more = reached | seen_NN[reached].any(0)
        if (more == reached).all():
            return bool(reached.all())
        reached = more


def pursue(logit_NN: Floats, seen_NN: NDArray[np.bool_]) -> tuple[Floats, int]:
    """min |L|_* + lambda |S|_1 so that L + S = M where it was observed, lambda = 1 / sqrt(n x the share observed), by
    the augmented Lagrangian with a growing penalty; then L's nearest skew-symmetric matrix of rank 2. And the rounds.
    """
    n = len(logit_NN)
    known_NN = seen_NN | np.eye(n, dtype=bool)  # an item against itself: logit 0, of course
    size = float(np.linalg.norm(logit_NN))
    if size == 0:
        return np.zeros_like(logit_NN), 0
    lam = 1 / np.sqrt(n * known_NN.mean())
    top = float(np.linalg.norm(logit_NN, 2))
    dual_NN = logit_NN / max(top, float(np.abs(logit_NN).max()) / lam)
    mu, most = 1.25 / top, 1.25e7 / top
    low_NN, sparse_NN, rounds = logit_NN, np.zeros_like(logit_NN), 0
    while rounds < _ROUNDS:
        rounds += 1
        low_NN = _shrink_rank(logit_NN - sparse_NN + dual_NN / mu, 1 / mu)
        rest_NN = logit_NN - low_NN + dual_NN / mu
        soft_NN = np.sign(rest_NN) * np.maximum(np.abs(rest_NN) - lam / mu, 0)
        sparse_NN = np.where(known_NN, soft_NN, rest_NN)  # what was not observed costs nothing
        gap_NN = logit_NN - low_NN - sparse_NN
        dual_NN = dual_NN + mu * gap_NN
        mu = min(mu * 1.05, most)
        if np.linalg.norm(gap_NN) <= 1e-9 * size:
            break
    return rank_two(low_NN), rounds


def _shrink_rank(a_NN: Floats, by: float) -> Floats:
    u, s, vt = np.linalg.svd(a_NN)
    return np.asarray((u * np.maximum(s - by, 0)) @ vt)


def rank_two(a_NN: Floats) -> Floats:
    """The nearest skew-symmetric matrix of rank 2."""
    skew_NN = (a_NN - a_NN.T) / 2
    u, s, vt = np.linalg.svd(skew_NN)
    low_NN = (u[:, :2] * s[:2]) @ vt[:2]
    return np.asarray((low_NN - low_NN.T) / 2)


def least_absolute(logit_NN: Floats, seen_NN: NDArray[np.bool_]) -> tuple[Floats, int]:
    """w_i - w_j for the w of the least absolute deviations, by the alternating direction method. And the rounds."""
    n = len(logit_NN)
    i_E, j_E = np.nonzero(np.triu(seen_NN))
    to_NE = np.zeros((n, len(i_E)))  # w = to @ logits, of least squares
    to_NE[i_E, np.arange(len(i_E))], to_NE[j_E, np.arange(len(i_E))] = 1, -1
    to_NE = np.linalg.pinv(to_NE @ to_NE.T) @ to_NE
    given_E = logit_NN[i_E, j_E]
    wrong_E, dual_E, w_N, rounds = np.zeros_like(given_E), np.zeros_like(given_E), np.zeros(n), 0
    while rounds < _ROUNDS:
        rounds += 1
        before_N, w_N = w_N, to_NE @ (given_E - wrong_E + dual_E)
        rest_E = given_E - (w_N[i_E] - w_N[j_E]) + dual_E
        wrong_E = np.sign(rest_E) * np.maximum(np.abs(rest_E) - 0.5, 0)
        dual_E = rest_E - wrong_E
        if rounds > 1 and np.abs(w_N - before_N).max() <= 1e-10 * (1 + np.abs(w_N).max()):
            break
    return w_N[:, None] - w_N[None], rounds

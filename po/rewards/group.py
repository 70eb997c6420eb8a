"""What can only be said of the rewards of a whole group: plain functions over numbers.

Where a paper's form could not be checked against the paper or its code, the docstring says `Unverified`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def contrast_mask(accuracy: Sequence[float], behaviour: Sequence[bool], epsilon: float) -> int:
    """GeometryZero's group-contrastive mask M: +1 where the samples with the behaviour (an auxiliary construction) are
    more accurate on average, by more than epsilon, than those without; -1 where less; else 0, also where either kind
    is missing. The reward gets M for each sample with the behaviour.

    Wang et al. 2025, GeometryZero, arXiv:2506.07160. Unverified: epsilon; that an empty side means 0.
    """
    have = [a for a, b in zip(accuracy, behaviour, strict=True) if b]
    lack = [a for a, b in zip(accuracy, behaviour, strict=True) if not b]
    if not have or not lack:
        return 0
    gap = math.fsum(have) / len(have) - math.fsum(lack) / len(lack)
    return (gap > epsilon) - (gap < -epsilon)


def correct_length(length: int, correct: bool, target: int, scale: float) -> float:
    """GeometryZero's length reward: scale x min(length / target, 1) for a correct answer, else 0.

    Same paper. Unverified: the whole form; only that there is a length reward is known.
    """
    return scale * min(length / target, 1.0) if correct else 0.0


def contrastive_rewards(rewards: Sequence[float], baselines: Sequence[Sequence[float]]) -> list[float]:
    """r - mean of the rewards that answers of the SFT policy to the same prompt had.

    Shen et al. 2024, Improving RLHF Using Contrastive Rewards, arXiv:2403.07708. Unverified: the difference as the
    form, the number of baselines, no scaling. With advantages per prompt (GRPO, RLOO) it changes nothing.
    """
    return [r - baseline_mean(b) for r, b in zip(rewards, baselines, strict=True)]


def baseline_mean(baseline: Sequence[float]) -> float:
    """The mean; ValueError where there is nothing, or something that is not finite, to take it of."""
    if not baseline or not all(math.isfinite(b) for b in baseline):
        raise ValueError(f"expected a list of finite baseline rewards, got {list(baseline)[:4]}")
    return math.fsum(baseline) / len(baseline)


def rank_normalised(scores: Sequence[float]) -> list[float]:
    """Ranks from 0 (the lowest) to 1 (the highest); equal scores share the mean of their ranks; one alone has 0.5."""
    n = len(scores)
    if n == 1:
        return [0.5]
    return [(sum(t < s for t in scores) + (sum(t == s for t in scores) - 1) / 2) / (n - 1) for s in scores]


def anchor_ranking(first: Sequence[float], second: Sequence[float]) -> tuple[list[float], list[bool]]:
    """Rewards of candidates that were each compared with the anchor in both orders, and which were judged alike.

    first: P(the candidate is the better one) with the candidate shown first; second: the same with it shown second.
    Rewards are the rank-normalised means; alike: both orders are on the same side of 1/2.

    PU-RL distillation, arXiv:2601.20687. Unverified: the comparison, its averaging and the normalisation.
    """
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    alike = [(a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5) for a, b in zip(first, second, strict=True)]
    return rank_normalised(means), alike


def pairwise_ranking(better: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """Rewards of candidates that were compared with each other, and the share of pairs whose two orders agree.

    better[i][j]: P(i is better than j) with i shown first; the diagonal is not read. A candidate's score is the mean of
    its comparisons over both orders. One candidate alone has 0.5, and agrees. Paper and Unverified as `anchor_ranking`.
    """
    n = len(better)
    both = [[(better[i][j] + 1 - better[j][i]) / 2 if i != j else 0.0 for j in range(n)] for i in range(n)]
    pairs = [(better[i][j], 1 - better[j][i]) for i in range(n) for j in range(i)]
    agree = [(a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5) for a, b in pairs]
    return rank_normalised([math.fsum(row) for row in both]), sum(agree) / len(agree) if agree else 1.0


def step_advantages(start: float, values: Sequence[float]) -> list[float]:
    """A_i = Q_i - Q_(i-1) of the steps of one response; start is Q_0, the prompt's own value. They sum to the last
    value less the first.

    Setlur et al. 2024, RL on Incorrect Synthetic Data, arXiv:2406.14532. Q_i is the success rate of completions that
    are sampled after step i (the paper: from the best of 5); sampling them is the caller's.
    """
    before = [start, *values[:-1]]
    return [q - p for p, q in zip(before, values, strict=True)]


def first_pit(values: Sequence[float]) -> int:
    """The first step with the lowest value, counted from 0: the rejected side of a pair ends with it. Same paper."""
    return min(range(len(values)), key=lambda i: values[i])

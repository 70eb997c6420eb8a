"""What data_prep/repair.py's three repairs find of planted faults, and what that is worth, as one table.

    python benchmarks/repair.py                # about half a minute on one core
    python benchmarks/repair.py --seeds 3      # a quick look

Synthetic worlds with a known truth, fixed seeds; po's own functions do the repairs.

complete: items with true scores, compared in pairs; a share of the comparisons is there, a share of these is off by 4
    logits either way. Named: found to be off by more than 1. tau: of the items' ranking with the true one, by the mean
    logit of the comparisons as they are (before) and of the mended ones. `votes`: a probability is the share of so many
    votes, otherwise exact.
strength: pairs of answers in 20 dimensions, labels by Bradley-Terry with planted flips; ten linear reward models, each
    trained on one half and judging the other. Named: turned over (a strength below 0, or as said). tau: (pairs labelled
    as the truth has it - others) / all, which sees Bradley-Terry's own noise too; or, `of a model`, of a reward model's
    scores of unseen answers with the true ones, trained on the labels as they are and on the mended ones. `in-fold`:
    the models were trained on the pairs they judge.
pseudo: few pairs and many answers without labels, each with a noisy score. Planted: the desirable answers. Named:
    labelled desirable. tau: of a model trained on the pairs alone, and on the pseudo-labelled answers as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from po.prep.agreement import Found, kendall_tau
from po.prep.curatron import Method, borda, complete, observed_logits
from po.prep.pseudo import Kind, Scores, labels
from po.prep.strength import Bands, Strength, mend

Floats = NDArray[np.float64]
DIMENSIONS, MODELS = 20, 10


@dataclass(frozen=True)
class Line:
    """One seed of one setting, or the means over seeds."""

    precision: float
    recall: float
    before: float
    after: float


def completed(
    seed: int, n: int = 30, observed: float = 1.0, wrong: float = 0.08, votes: int = 0, method: Method = "low_rank"
) -> Line:
    """One world of comparisons."""
    draw = np.random.default_rng(seed)
    true_N = draw.normal(size=n)
    i_E, j_E = np.triu_indices(n, 1)
    off_E = np.where(draw.random(len(i_E)) < wrong, draw.choice([-4.0, 4.0], len(i_E)), 0)
    p_E = 1 / (1 + np.exp(-(true_N[i_E] - true_N[j_E] + off_E)))
    p_E = (draw.binomial(votes, p_E) + 0.5) / (votes + 1) if votes else p_E
    seen_E = draw.random(len(i_E)) < observed
    given_NN = np.full((n, n), np.nan)
    given_NN[i_E[seen_E], j_E[seen_E]] = p_E[seen_E]
    done = complete(given_NN, method, clip=1e-3)
    found = Found.of((off_E != 0)[seen_E].tolist(), done.corrupted_NN[i_E, j_E][seen_E].tolist())
    before_N = borda(*observed_logits(given_NN, 1e-3))
    return Line(found.precision, found.recall, tau(before_N, true_N), tau(done.score_N, true_N))


def tau(a_N: Floats, b_N: Floats) -> float:
    """Kendall's, of two rankings."""
    return kendall_tau(a_N.tolist(), b_N.tolist())


def logistic(x_ND: Floats, weight_N: Floats | None = None, steps: int = 15, ridge: float = 1.0) -> Floats:
    """w of the most likely sigmoid(x w) = 1 for all rows, with a penalty: Newton's steps."""
    w_D = np.zeros(x_ND.shape[1])
    weight_N = np.ones(len(x_ND)) if weight_N is None else weight_N
    for _ in range(steps):
        p_N = 1 / (1 + np.exp(-np.clip(x_ND @ w_D, -30, 30)))
        slope_D = x_ND.T @ (weight_N * (1 - p_N)) - ridge * w_D
        curve_DD = (x_ND * (weight_N * p_N * (1 - p_N))[:, None]).T @ x_ND + ridge * np.eye(len(w_D))
        w_D = w_D + np.linalg.solve(curve_DD, slope_D)
    return w_D


def strengthened(
    seed: int, flipped: float = 0.2, low: float = 0.0, pairs: int = 400, folds: bool = True, of_model: bool = False
) -> Line:
    """One world of pairs. folds: the margins of a pair come from models that have not seen it."""
    draw = np.random.default_rng(seed)
    true_D = draw.normal(size=DIMENSIONS)
    gap_ND = draw.normal(size=(pairs, DIMENSIONS))
    better_N = draw.random(pairs) < 1 / (1 + np.exp(-gap_ND @ true_D))
    planted_N = draw.random(pairs) < flipped
    gap_ND = gap_ND * np.where(better_N != planted_N, 1, -1)[:, None]  # as labelled: chosen - rejected
    margin_MN = np.empty((MODELS, pairs))
    for m, half_N in enumerate(draw.random((MODELS, pairs)) < 0.5):
        for side_N in (half_N, ~half_N):
            judged_N = ~side_N if folds else side_N
            margin_MN[m, judged_N] = gap_ND[judged_N] @ logistic(gap_ND[side_N])
    bands = Bands(low=low, middle=low)
    done = [mend(s, bands.way(s)) for s in (Strength.of(one).mean for one in margin_MN.T.tolist())]
    turned_N = np.array([one is not None and one.flipped for one in done])
    found = Found.of(planted_N.tolist(), turned_N.tolist())
    mended_ND = gap_ND * np.where(turned_N, -1, 1)[:, None]
    if not of_model:
        return Line(found.precision, found.recall, *(float(np.sign(x @ true_D).mean()) for x in (gap_ND, mended_ND)))
    unseen_ND = draw.normal(size=(200, DIMENSIONS))
    taus = [tau(unseen_ND @ logistic(x), unseen_ND @ true_D) for x in (gap_ND, mended_ND)]
    return Line(found.precision, found.recall, *taus)


def pseudo_labelled(seed: int, kind: Kind = "kde", pairs: int = 30, free: int = 1000, noise: float = 2.0) -> Line:
    """One world of answers. Desirable: better than the middle; a score is the true one plus noise."""
    draw = np.random.default_rng(seed)
    true_D = draw.normal(size=DIMENSIONS)
    answer_ND = draw.normal(size=(2 * pairs + free, DIMENSIONS))
    quality_N = answer_ND @ true_D
    score_N = quality_N + noise * draw.normal(size=len(answer_ND))
    first_N, second_N = np.arange(pairs), np.arange(pairs, 2 * pairs)
    won_N = np.where(quality_N[first_N] > quality_N[second_N], first_N, second_N)
    lost_N = first_N + second_N - won_N
    known = Scores()
    for name, side in ((True, won_N), (False, lost_N)):
        for k in side:
            known.add(float(score_N[k]), name, str(k).encode())
    made = labels(score_N[2 * pairs :].tolist(), known.threshold(kind))
    found = Found.of((quality_N[2 * pairs :] > 0).tolist(), [m is True for m in made])
    few_ND = answer_ND[won_N] - answer_ND[lost_N]
    more_ND = answer_ND[2 * pairs :] * np.where(np.array(made, dtype=bool), 1, -1)[:, None]
    unseen_ND = draw.normal(size=(200, DIMENSIONS))
    models = (logistic(few_ND), logistic(np.concatenate([few_ND, more_ND])))
    taus = [tau(unseen_ND @ w, unseen_ND @ true_D) for w in models]
    return Line(found.precision, found.recall, *taus)


def settings() -> dict[str, Callable[[int], Line]]:
    """What is measured, by name."""

    def of(function: Callable[..., Line], **given: Any) -> Callable[[int], Line]:
        return lambda seed: function(seed, **given)

    methods: tuple[Method, ...] = ("low_rank", "least_absolute")
    named = {"low_rank": "complete, low rank", "least_absolute": "complete, least absolute"}
    out: dict[str, Callable[[int], Line]] = {}
    for n, observed, wrong, votes in ((30, 1, 0.08, 0), (30, 0.6, 0.08, 0), (30, 0.6, 0.2, 0), (30, 0.6, 0.08, 20),
                                      (8, 1, 0.15, 0), (8, 0.7, 0.15, 0)):  # fmt: skip
        for method in methods:
            name = f"{named[method]}: {n} items, {observed:.0%} there, {wrong:.0%} of them wrong"
            given = {"n": n, "observed": observed, "wrong": wrong, "votes": votes, "method": method}
            out[name + (f", {votes} votes" if votes else "")] = of(completed, **given)
    for share in (0.1, 0.2, 0.3):
        out[f"strength: {share:.0%} of the labels flipped"] = of(strengthened, flipped=share)
    out["strength, below -1: 20% flipped"] = of(strengthened, low=-1.0)
    out["strength, 150 pairs: 20% flipped"] = of(strengthened, pairs=150)
    out["strength, 150 pairs, in-fold: 20% flipped"] = of(strengthened, pairs=150, folds=False)
    for low in (0.0, -1.0):
        out[f"strength, of a model, below {low:g}: 20% flipped"] = of(strengthened, low=low, of_model=True)
    for kind in ("kde", "min"):
        out[f"pseudo, {kind}: 30 pairs, 1000 answers"] = of(pseudo_labelled, kind=kind)
    return out


def mean(lines: Sequence[Line]) -> Line:
    """Over seeds."""
    values = np.array([[x.precision, x.recall, x.before, x.after] for x in lines]).mean(0)
    return Line(*map(float, values))


def measured(setting: Callable[[int], Line], seeds: int) -> tuple[Line, int]:
    """The mean, and how many seeds gave nothing to repair (comparisons that nothing connects)."""
    lines = []
    for seed in range(seeds):
        try:
            lines.append(setting(seed))
        except ValueError:
            continue
    return mean(lines), seeds - len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args(argv)
    print(f"Means over {args.seeds} seeds.\n")
    print("| repair | precision | recall | Kendall tau before | after |\n|---|---|---|---|---|")
    for name, setting in settings().items():
        found, left = measured(setting, args.seeds)
        name += f" ({left} seeds not connected)" if left else ""
        numbers = (found.precision, found.recall, found.before, found.after)
        print(f"| {name} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

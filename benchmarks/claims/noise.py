"""Too much training, wrong labels, few labels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from harness.stats import interval

from claims.lab import Finding, Lab, best_worst, distinct, minus, pair

AT = (10, 20, 40, 80)


def overoptimisation(lab: Lab, seeds: Sequence[int] = (0, 1, 2)) -> Finding:
    """True reward on the way, with and without the likelihood of the better answer in the loss."""
    finding = Finding(
        "Regularized PO resists over-optimisation longer than DPO",
        "Liu et al. 2024 (arXiv:2405.16436): with the likelihood of the better answers added (an adversarial "
        "regulariser), the policy does not drift to answers that the data says nothing about.",
        "64 pairs (best and worst of four answers), 8 a step, constant learning rate 1e-3, beta 0.1, eta 1: 10 passes. "
        "True reward of answers to held-out questions, and KL to the reference, after so many steps.",
        ("loss", *(f"step {t}: reward (KL)" for t in AT)),
    )
    path = lab.rows("few-pairs", [pair(r) for r in distinct(lab.world.train)[:64]])
    at = [lab.steps(t) for t in AT]
    way: dict[str, list[list[float]]] = {}
    terms = {
        "dpo": {"head": "dpo", "beta": 0.1},
        "rpo_sft": {"head": "rpo_sft", "beta": 0.1, "eta": 1.0},
    }
    for name, term in terms.items():
        runs: list[list[dict[str, float]]] = []
        for seed in seeds:
            seen: list[dict[str, float]] = []
            constant = {"lr_scheduler_type": "constant"}
            lab.train(
                term, path, seed, AT[-1], at, lambda t, p, s=seed, o=seen: o.append(lab.score(p, s)), train=constant
            )
            runs.append(seen)
        cells = [
            f"{interval([r[i]['reward'] for r in runs]).text()} ({interval([r[i]['kl'] for r in runs]).text(1)})"
            for i in range(len(AT))
        ]
        finding.rows.append((name, *cells))
        way[name] = [[point["reward"] for point in r] for r in runs]
    dpo, rpo = way["dpo"], way["rpo_sft"]
    finding.expect("DPO: highest reward minus the last", [max(r) - r[-1] for r in dpo])
    finding.expect("last reward: Regularized PO above DPO", minus([r[-1] for r in rpo], [r[-1] for r in dpo]))
    fall = [[max(r) - r[-1] for r in runs] for runs in (dpo, rpo)]
    finding.expect("fall from the highest reward: DPO's larger", minus(fall[0], fall[1]))
    return finding


def flipped(lab: Lab, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> Finding:
    """A fifth of the pairs the wrong way round."""
    finding = Finding(
        "Robust variants win under 20 % flipped labels",
        "Chowdhury et al. 2024 (arXiv:2403.00409, rDPO) and Mitchell's conservative DPO: with labels that are wrong at "
        "a known rate, a loss that knows the rate beats DPO.",
        "80 pairs (best and worst of four answers), 20 % of them swapped, 40 steps of 8: 4 passes; beta 0.3, epsilon "
        "0.2. True reward of answers to held-out questions.",
        ("loss", "labels", "true reward", "KL"),
    )
    rows = distinct(lab.world.train)[:80]
    dpo = {"head": "dpo", "beta": 0.3}
    runs = {
        ("dpo", "all right"): (dpo, 0),
        ("dpo", "20 % flipped"): (dpo, 5),
        ("dpo, label_smoothing 0.2", "20 % flipped"): (dpo | {"label_smoothing": 0.2}, 5),
        ("rdpo, epsilon 0.2", "20 % flipped"): ({"head": "rdpo", "beta": 0.3, "epsilon": 0.2}, 5),
    }
    got: list[list[float]] = []
    for (name, labels), (term, one_in) in runs.items():
        found = []
        for seed in seeds:
            wrong = set(random.Random(seed).sample(range(len(rows)), len(rows) // one_in if one_in else 0))
            path = lab.rows(f"flipped-{len(wrong)}-{seed}", [pair(r, i in wrong) for i, r in enumerate(rows)])
            found.append(lab.score(lab.train(term, path, seed, 40).plain, seed))
        got.append([f["reward"] for f in found])
        finding.rows.append((name, labels, interval(got[-1]).text(), interval([f["kl"] for f in found]).text(2)))
    clean, noisy, smooth, robust = got
    finding.expect("reward: DPO on right labels above DPO on flipped ones", minus(clean, noisy))
    finding.expect("reward: DPO with label smoothing above DPO", minus(smooth, noisy))
    finding.expect("reward: rDPO above DPO", minus(robust, noisy))
    return finding


def sspo(lab: Lab, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> Finding:
    """Labels on a tenth of the questions."""
    finding = Finding(
        "SSPO with 10 % labels beats DPO on those labels",
        "Lee et al. 2025 (arXiv:2511.00040): a few pairs give a reward threshold that labels the other answers, and "
        "training on those as well beats training on the pairs alone.",
        "320 questions with four answers; on 32 of them best and worst are labelled, the rest is unlabelled. SSPO "
        "takes all, DPO (and SSPO) the 32 pairs alone; 40 steps of 8 questions. True reward of answers to held-out "
        "questions.",
        ("loss", "rows", "true reward", "KL"),
    )
    rows = distinct(lab.world.train)[:320]
    some, few = [_labelled(r, i % 10 == 0) for i, r in enumerate(rows)], [r for i, r in enumerate(rows) if i % 10 == 0]
    tenth, pairs = lab.rows("tenth", some), lab.rows("tenth-pairs", [pair(r) for r in few])
    alone = lab.rows("tenth-alone", [_labelled(r, True, rest=False) for r in few])
    own = {"head": "sspo", "beta": 10, "lam": 0.02}
    runs = {
        ("sspo", "all"): (own, tenth),
        ("sspo", "labelled"): (own, alone),
        ("dpo, beta 0.1", "labelled"): ({"head": "dpo", "beta": 0.1}, pairs),
        ("dpo, beta 1", "labelled"): ({"head": "dpo", "beta": 1}, pairs),
    }
    got = {}
    for (name, which), (term, path) in runs.items():
        found = [lab.score(lab.train(term, path, seed, 40).plain, seed) for seed in seeds]
        got[name, which] = [f["reward"] for f in found]
        kl = interval([f["kl"] for f in found]).text(2)
        finding.rows.append((name, which, interval(got[name, which]).text(), kl))
    for beta in ("0.1", "1"):
        other = got[f"dpo, beta {beta}", "labelled"]
        finding.expect(f"reward: SSPO above DPO (beta {beta})", minus(got["sspo", "all"], other))
    finding.expect(
        "reward: SSPO with unlabelled answers above SSPO without", minus(got["sspo", "all"], got["sspo", "labelled"])
    )
    return finding


def _labelled(row: Any, known: bool, rest: bool = True) -> dict[str, Any]:
    best, worst = best_worst(row)
    if not rest:
        sides = [{"content": best["content"], "label": True}, {"content": worst["content"], "label": False}]
        return {"id": row["id"], "prompt": row["prompt"], "responses": sides}
    label = {best["content"]: True, worst["content"]: False} if known else {}
    answers = [{"content": a["content"], "label": label.get(a["content"])} for a in row["responses"]]
    return {"id": row["id"], "prompt": row["prompt"], "responses": answers}

"""What happens to the likelihood of better and worse answers: NCA, and the two APO losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.stats import interval
from harness.world import Row

from claims.lab import Finding, Lab, best_worst, distinct, minus
from po.sandbox.sampling import log_probs

HEADER = ("head", "trained pairs: better", "worse", "other questions: better", "worse", "true reward")


def moves(lab: Lab, plain: Any, rows: Sequence[Row]) -> dict[str, float]:
    """Mean log pi - log ref of the better and of the worse answers, in nats per answer."""
    out = {}
    for side, name in enumerate(("better", "worse")):
        coded = [lab.world.encode(r["prompt"], best_worst(r)[side]["content"]) for r in rows]
        with torch.no_grad():
            out[name] = (log_probs(plain, coded) - log_probs(lab.world.model, coded)).mean().item()
    return out


def follow(
    lab: Lab,
    finding: Finding,
    terms: Mapping[str, Mapping[str, Any]],
    path: Path,
    rows: Sequence[Row],
    seeds: Sequence[int],
    steps: int,
) -> dict[str, dict[str, list[float]]]:
    """Train each term for each seed; a table line each; the numbers by term and by what they measure."""
    out: dict[str, dict[str, list[float]]] = {}
    for name, term in terms.items():
        found = []
        for seed in seeds:
            plain = lab.train(term, path, seed, steps).plain
            found.append(moves(lab, plain, rows[:96]) | lab.score(plain, seed))
        out[name] = {k: [f[k] for f in found] for k in ("better", "worse", "best", "worst", "reward")}
        cells = [interval(out[name][k]).text(2) for k in ("better", "worse", "best", "worst")]
        finding.rows.append((name, *cells, interval(out[name]["reward"]).text()))
    return out


def nca(lab: Lab, seeds: Sequence[int] = (0, 1, 2, 3)) -> Finding:
    """NCA against InfoNCA and DPO."""
    finding = Finding(
        "NCA keeps the likelihood of the better answers",
        "Chen et al. 2024 (arXiv:2402.05369): under DPO and InfoNCA, which compare answers only with each other, the "
        "likelihood of preferred answers falls along with the others'; NCA, which judges each by itself, keeps it.",
        "60 steps of 8 questions: DPO on best and worst of four answers, InfoNCA and NCA on all four (alpha 10), beta "
        "0.1. Log pi / ref in nats per answer, on trained pairs and on best and worst answers to held-out questions.",
        HEADER,
    )
    rows = distinct(lab.world.train)
    terms = {
        "dpo": {"head": "dpo", "beta": 0.1},
        "infonca": {"head": "infonca", "beta": 0.1, "alpha": 10},
        "nca": {"head": "nca", "beta": 0.1, "alpha": 10},
    }
    got = follow(lab, finding, terms, lab.rows("scored", rows), rows, seeds, 60)
    finding.expect("DPO: fall of the better answers", [-x for x in got["dpo"]["better"]])
    finding.expect("InfoNCA: fall of the better answers", [-x for x in got["infonca"]["better"]])
    finding.expect("NCA's better answers above DPO's", minus(got["nca"]["better"], got["dpo"]["better"]))
    finding.expect("NCA's better answers above InfoNCA's", minus(got["nca"]["better"], got["infonca"]["better"]))
    finding.expect("NCA: better answers no more than 0.5 nats below the reference", got["nca"]["better"], least=-0.5)
    return finding


def apo(lab: Lab, seeds: Sequence[int] = (0, 1, 2)) -> Finding:
    """APO-zero and APO-down, on pairs that are seen once and on few pairs that are seen often."""
    finding = Finding(
        "APO-zero and APO-down move both likelihoods the stated way",
        "D'Oosterlinck et al. 2024 (arXiv:2408.06266): APO-zero raises the better answer's likelihood and lowers the "
        "worse's; APO-down lowers both, the worse's more.",
        "beta 0.1, best and worst of four answers. 48 steps of 8 pairs, of 384 pairs seen once and of 48 pairs seen "
        "8 times. Log pi / ref in nats per answer.",
        HEADER,
    )
    every = distinct(lab.world.train)
    for many, rows in (("once", every[:384]), ("8 times", every[:48])):
        path = lab.rows(f"pairs-{len(rows)}", rows)
        terms = {f"{h}, {many}": {"head": h, "beta": 0.1} for h in ("apo_zero", "apo_down")}
        got = follow(lab, finding, terms, path, rows, seeds, 48)
        zero, down = (got[name] for name in terms)
        finding.expect(f"APO-zero, {many}: better answers rise", zero["better"])
        finding.expect(f"APO-zero, {many}: worse answers fall", [-x for x in zero["worse"]])
        finding.expect(f"APO-down, {many}: better answers fall", [-x for x in down["better"]])
        finding.expect(f"APO-down, {many}: worse answers fall further", minus(down["better"], down["worse"]))
    return finding

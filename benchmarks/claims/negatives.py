"""Unlearning from bad answers alone: NPO against gradient ascent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.stats import interval

from claims.lab import Finding, Lab, best_worst, distinct, minus
from claims.likelihood import moves

AT = (10, 20, 40, 80)
GRADIENT_ASCENT = 1e-4  # NPO's limit for beta -> 0: its gradient is 2 sigmoid(beta u), within 1 % of 1 for |u| < 200


def npo(lab: Lab, seeds: Sequence[int] = (0, 1, 2, 3)) -> Finding:
    """How fast answers that nobody wants to forget are lost."""
    finding = Finding(
        "NPO's collapse is slower than gradient ascent's",
        "Zhang et al. 2024 (arXiv:2404.05868): unlearning by gradient ascent soon destroys the model; NPO forgets the "
        "same answers while it drifts far more slowly, the slower the larger beta.",
        "The worst of four answers to 256 questions is to be forgotten, 16 a step, learning rate 5e-4 throughout. "
        "Log pi / ref in nats per answer after so many steps: of what is to be forgotten, and of the best answers to "
        "the same questions, which are to stay. Gradient ascent is NPO with beta 1e-4.",
        ("loss", *(f"step {t}: forgotten / kept" for t in AT)),
    )
    rows = distinct(lab.world.train)[:256]
    bad = [{"id": r["id"], "prompt": r["prompt"], "label": False, **_said(best_worst(r)[1])} for r in rows]
    path = lab.rows("forget", bad)
    at = [lab.steps(t) for t in AT]
    kept: dict[str, list[list[float]]] = {}
    for name, beta in (("gradient ascent", GRADIENT_ASCENT), ("npo, beta 0.1", 0.1), ("npo, beta 0.5", 0.5)):
        found = [_trajectory(lab, beta, path, rows, seed, at) for seed in seeds]
        cells = []
        for i in range(len(AT)):
            gone, stay = (interval([f[i][side] for f in found]).text(1) for side in ("worse", "better"))
            cells.append(f"{gone} / {stay}")
        finding.rows.append((name, *cells))
        kept[name] = [[f[i]["better"] for i in range(len(AT))] for f in found]
    ascent, small, large = kept.values()
    last = [[k[-1] for k in way] for way in (ascent, small, large)]
    finding.expect(f"kept answers after {AT[-1]} steps: NPO (0.1) above gradient ascent", minus(last[1], last[0]))
    finding.expect(f"kept answers after {AT[-1]} steps: NPO (0.5) above NPO (0.1)", minus(last[2], last[1]))
    late = [[k[-1] - k[-2] for k in way] for way in (ascent, small)]
    finding.expect(f"kept answers, steps {AT[-2]} to {AT[-1]}: NPO (0.1) loses less", minus(late[1], late[0]))
    return finding


def _said(answer: dict[str, Any]) -> dict[str, Any]:
    return {"completion": [{"role": "assistant", "content": answer["content"]}]}


def _trajectory(
    lab: Lab, beta: float, path: Any, rows: Sequence[Any], seed: int, at: Sequence[int]
) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    lab.train(
        {"head": "npo", "beta": beta},
        path,
        seed,
        AT[-1],
        at,
        lambda step, plain: found.append(moves(lab, plain, rows[:96])),
        batch=16,
        learning_rate=5e-4,
        train={"lr_scheduler_type": "constant"},
    )
    return found

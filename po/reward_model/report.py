"""What is written beside a reward model: reward_report.json, a table for people, a plot of the calibration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from po.reward_model.evaluate import Evaluation
from po.reward_model.spec import Ordinal, RewardRecipe

REPORT, PLOT = "reward_report.json", "calibration.png"


def use(recipe: RewardRecipe, folder: Path) -> dict[str, Any]:
    """What `rollout.rewards` and score.py are told to use the model."""
    o = recipe.objective
    if not isinstance(o, Ordinal):
        return {"model": str(folder), "options": {"kind": "classifier"}}
    return {
        "model": str(folder),
        "options": {"kind": "ordinal", "template": o.template, "ratings": list(o.ratings)},
    }


def write(folder: Path, recipe: RewardRecipe, rows: Mapping[str, Any], found: Evaluation | None) -> list[str]:
    """Write the report, and the plot where matplotlib is there; lines for people."""
    said = {
        "objective": {"kind": recipe.kind, **asdict(recipe.objective)},
        "use": use(recipe, folder),
        "rows": {split: {"pairs": n} for split, n in rows.items()},
        "evaluation": None if found is None else found.to_json(),
    }
    (folder / REPORT).write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    if found is None:
        return ["no evaluation: name held-out rows at data.eval"]
    plotted = plot(found, folder / PLOT)
    return [table(found), *([] if plotted else [f"no {PLOT}: it needs matplotlib; pip install 'po[prep]'"])]


def table(e: Evaluation) -> str:
    """The evaluation as text."""
    lines = [
        f"held out: {e.pairs} pairs, accuracy {e.accuracy:.3f} (standard error {e.standard_error:.3f}), "
        f"mean margin {e.margin:.3f}, loss {e.loss:.4f}, ECE {e.ece:.3f}",
        f"scores: mean {e.scores['mean']:.3f}, std {e.scores['std']:.3f}, "
        f"from {e.scores['min']:.3f} to {e.scores['max']:.3f}",
        f"by {e.strength}:",
        *(
            f"  {b.low:8.3f} to {b.high:8.3f}  {b.pairs:5} pairs  accuracy {b.accuracy:.3f}  margin {b.margin:7.3f}"
            for b in e.buckets
        ),
        "calibration, by the probability that it gives the answer it prefers:",
        *(
            f"  {b.low:.2f} to {b.high:.2f}  {b.pairs:5} pairs  said {b.said:.3f}  right {b.observed:.3f}"
            for b in e.bins
        ),
    ]
    return "\n".join(lines)


def plot(e: Evaluation, path: Path) -> bool:
    """The calibration as a picture; False where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, label="what it says is so")
    sizes = [20 + 400 * b.pairs / e.pairs for b in e.bins]
    axes.plot([b.said for b in e.bins], [b.observed for b in e.bins], color="tab:blue", linewidth=1)
    axes.scatter([b.said for b in e.bins], [b.observed for b in e.bins], sizes, color="tab:blue", label="pairs")
    axes.set(xlabel="probability given to the preferred answer", ylabel="share that was right", xlim=(0.48, 1.02))
    axes.set_title(f"{e.pairs} held-out pairs: accuracy {e.accuracy:.3f}, ECE {e.ece:.3f}")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    return True

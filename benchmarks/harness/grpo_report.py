"""Tables of the comparison with TRL's GRPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

SIDES = ("trl", "trl-lean", "po")
PARTS = ("whole step", "sampling", "training")


def parts(run: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of a step's parts."""
    steps = run["steps"]
    pick = {
        "whole step": [(w, c) for w, c, _, _ in steps],
        "sampling": [(w, c) for _, _, w, c in steps],
        "training": [(w - sw, c - sc) for w, c, sw, sc in steps],
    }
    return {name: (median(w for w, _ in x), median(c for _, c in x)) for name, x in pick.items()}


def times(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of medians over turns, and how many times po's the other sides' are; of wall time also over the turns."""
    found = {side: [parts(run) for run in some] for side, some in runs.items()}
    lines = [
        "| of a step | | wall s | CPU s | wall / po's | least to most of the turns | CPU / po's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PARTS:
        mid = {side: [median(p[name][i] for p in some) for i in (0, 1)] for side, some in found.items()}
        for side, (wall, cpu) in mid.items():
            turns = [a[name][0] / b[name][0] for a, b in zip(found[side], found["po"])]
            ratios = f"{wall / mid['po'][0]:.2f}x | {min(turns):.2f} to {max(turns):.2f} | {cpu / mid['po'][1]:.2f}x"
            lines.append(f"| {name} | {side} | {wall:.2f} | {cpu:.2f} | {'| |' if side == 'po' else ratios} |")
    gib = {side: median(run["gib"] for run in some) for side, some in runs.items()}
    length = {side: mean(mean(run["length"]) for run in some) for side, some in runs.items()}
    memory = ", ".join(f"{side} {x:.2f} GiB" + f" ({x / gib['po']:.2f}x)" * (side != "po") for side, x in gib.items())
    tokens = ", ".join(f"{side} {x:.1f}" for side, x in length.items())
    return [*lines, "", f"Peak memory of the process: {memory}. Tokens of a completion, mean: {tokens}."]


def spread(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def curves(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Mean rewards over seeds along the run, and how many standard errors the sides differ by."""
    lines = ["| step | TRL reward | po reward | difference / its standard error |", "|---|---|---|---|"]
    last = len(runs["po"][0]["reward"])
    gaps = []
    for step in range(last):
        a, b = ([run["reward"][step] for run in runs[side]] for side in ("trl", "po"))
        error = (spread(a) ** 2 + spread(b) ** 2) ** 0.5
        gaps.append((mean(a) - mean(b)) / error)
        if step % max(1, last // 6) == 0 or step == last - 1:
            lines.append(
                f"| {step + 1} | {mean(a):.4f} ± {spread(a):.4f} | {mean(b):.4f} ± {spread(b):.4f} | {gaps[-1]:+.1f} |"
            )
    a, b = ([mean(run["reward"]) for run in runs[side]] for side in ("trl", "po"))
    whole = (mean(a) - mean(b)) / (spread(a) ** 2 + spread(b) ** 2) ** 0.5
    beyond = sum(abs(g) > 2 for g in gaps)
    return [
        *lines,
        "",
        f"± is the standard error over {len(a)} seeds. Mean reward of a run: TRL {mean(a):.4f} ± {spread(a):.4f}, po "
        f"{mean(b):.4f} ± {spread(b):.4f}, {whole:+.1f} standard errors apart; {beyond} of {last} steps differ by more "
        "than 2.",
    ]


def agreement(found: Mapping[str, float]) -> list[str]:
    """What TRL's trainer makes of po's samples."""
    worst = ", ".join(f"{name} {gap:.1e}" for name, gap in found.items())
    return [f"TRL's trainer given the samples of po's run: largest differences of a step's logged numbers: {worst}."]

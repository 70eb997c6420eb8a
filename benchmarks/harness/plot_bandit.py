"""Regret curves: the paper's budget as its figure shows it, and ten times as long on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot as plt
from torch import Tensor

COLORS = ("#4477aa", "#66ccee", "#228833", "#ee6677", "#aa3377", "#ccbb44")
PAPER, LEAST = 2000, 1e-7  # steps of the paper; below is rounding

Curves = Mapping[str, tuple[Sequence[int], Tensor, float]]  # steps, regret (E, S), regret of the fixed point


def draw(curves: Curves, path: Path) -> None:
    """Write the plot."""
    figure, (near, far) = plt.subplots(1, 2, figsize=(12.6, 5.0))
    start = next(iter(curves.values()))[1][0, 0].item()
    for color, (name, curve) in zip(COLORS, curves.items(), strict=True):
        _line(near, name, color, curve, PAPER)
        _line(far, name, color, curve, None)
    for axis in (near, far):
        axis.axhline(start, color="0.55", linestyle=(0, (4, 3)), linewidth=1)
        axis.set_xlabel("optimizer steps")
        axis.grid(color="0.94", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    near.set_ylabel("regret, J(pi*) - J(pi)")
    near.set_ylim(0, None)
    near.set_xlim(0, PAPER)
    near.set_title("the paper's budget: 100 epochs", fontsize=11, loc="left", fontweight="bold")
    far.set_yscale("log")
    far.set_ylim(LEAST, 1.5)
    far.set_xlim(0, None)
    far.axvline(PAPER, color="0.8", linewidth=1)
    far.set_title("longer; dotted: where the expected gradient is zero", fontsize=11, loc="left", fontweight="bold")
    far.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
    seeds = next(iter(curves.values()))[1].shape[1]
    figure.suptitle(
        f"Three-armed bandit, off-policy pairs: mean of {seeds} seeds, shaded: least to most; dashed: the reference",
        fontsize=12,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, name: str, color: str, curve: tuple[Sequence[int], Tensor, float], last: int | None) -> None:
    steps, regret_ES, rest = curve
    shown = [i for i, step in enumerate(steps) if last is None or step <= last]
    at, seen_ES = [steps[i] for i in shown], regret_ES[shown].clamp(min=LEAST / 10)
    axis.fill_between(at, seen_ES.amin(-1), seen_ES.amax(-1), color=color, alpha=0.18, linewidth=0)
    dashes = (0, (5, 2)) if name.endswith("E[R_beta]") else "-"  # lies on another curve at first
    axis.plot(at, seen_ES.mean(-1), color=color, linewidth=1.7, linestyle=dashes, label=name)
    if last is None and rest > LEAST:
        axis.axhline(rest, color=color, linewidth=1, linestyle=":")

"""Curves of several runs: the mean over seeds as a line, least to most as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Curve = Mapping[int, float]  # what was measured after so many of something; 0: the start


def draw(curves: Mapping[str, Sequence[Curve]], path: Path, across: str, up: str) -> None:
    """One line per name, over a logarithmic axis; all seeds of a name are at the same points."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for name, seeds in curves.items():
        at = [x for x in seeds[0] if x > 0]
        columns = [[seed[x] for seed in seeds] for x in at]
        (line,) = axes.plot(at, [sum(c) / len(c) for c in columns], marker="o", markersize=3, label=name)
        axes.fill_between(at, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, color=line.get_color())
    start = next(iter(curves.values()))[0][0]
    axes.axhline(start, color="grey", linewidth=0.8, linestyle=":", label="base")
    axes.set(xlabel=across, ylabel=up, xscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

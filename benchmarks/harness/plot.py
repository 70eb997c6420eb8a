"""The frontier as a picture: a panel per family, all other heads in grey behind it, DPO in black in each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot as plt

from harness.table import Point

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#009988", "#994455", "#777777")
MARKERS = "osD^vP>X<*"
LEAST_KL, MOST_KL = 0.02, 60.0  # nothing to see to the left; what goes beyond has collapsed
BELOW = 0.15  # as much below the base's reward is shown


def draw(points: Sequence[Point], base: float, path: Path) -> None:
    """Write the plot."""
    titles = list(dict.fromkeys(p.family for p in points))
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    size = (6.2 * columns, 3.7 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, title in zip(axes.flat, titles):
        _panel(axis, title, points, base)
    for axis in list(axes.flat)[len(titles) :]:
        axis.set_axis_off()
    for axis in list(axes.flat)[max(0, len(titles) - columns) : len(titles)]:
        axis.set_xlabel("KL to the reference, nats per answer")
        axis.tick_params(labelbottom=True)
    for row in axes:
        row[0].set_ylabel("true reward")
    axes[0][0].set_ylim(max(base - BELOW, min(p.reward.mean for p in points) - 0.02), None)
    axes[0][0].set_xlim(None, min(MOST_KL, 1.3 * max(p.kl.mean for p in points)))
    figure.suptitle(
        "True reward against KL to the reference, on the sandbox's held-out questions\n"
        "a curve per head over its strengths; bars: 95 %, over three seeds or over questions; dashed: the base model; "
        "a curve that leaves its panel has collapsed",
        fontsize=12,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """A head's points from weak to strong."""
    found: dict[str, list[Point]] = defaultdict(list)
    for p in sorted(points, key=lambda p: -p.beta):
        found[p.head].append(p)
    return found


def _panel(axis: Any, title: str, points: Sequence[Point], base: float) -> None:
    axis.set_xscale("log")
    axis.axhline(base, color="0.55", linestyle=(0, (4, 3)), linewidth=1)
    for line in curves([p for p in points if p.family != title and p.head != "dpo"]).values():
        axis.plot(*_xy(line), color="0.87", linewidth=0.8, marker="o", markersize=2, zorder=1)
    dpo = curves(points).get("dpo")
    if dpo:
        _curve(axis, dpo, "dpo", color="black", marker="o", zorder=2)
    own = [(h, line) for h, line in curves([p for p in points if p.family == title]).items() if h != "dpo"]
    for i, (head, line) in enumerate(own):
        _curve(axis, line, head, color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], zorder=3)
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.grid(color="0.94", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)


def _curve(axis: Any, line: Sequence[Point], name: str, **style: Any) -> None:
    half = [0.0 if math.isnan(p.reward.half) else p.reward.half for p in line]
    axis.errorbar(*_xy(line), yerr=half, elinewidth=0.9, capsize=2, linewidth=1.5, markersize=5, label=name, **style)


def _xy(line: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [max(p.kl.mean, LEAST_KL) for p in line], [p.reward.mean for p in line]

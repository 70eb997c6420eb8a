"""What a file of rows is made of: kinds, languages, lengths, rewards, and what length has to do with preference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from po.prep.check import Check

_BUCKETS = 40


def statistics(check: Check) -> dict[str, Any]:
    """What the rows are made of."""
    better, worse = (np.array(check.lengths[n], dtype=np.float64) for n in ("better", "worse"))
    margins, gap = np.array(check.margins, dtype=np.float64), better - worse
    known = np.isfinite(margins)
    total = sum(check.languages.values())
    out: dict[str, Any] = {
        "rows": {"in": check.counts["in"], "read": len(check.places)},
        "kinds": dict(check.kinds.most_common()),
        "prompts": len(np.unique(np.array(check.hashes["prompt"], dtype=np.uint64))),
        "languages": {k: n / total for k, n in check.languages.most_common(20)},
        "characters": {n: quantiles(check.lengths[n]) for n in check.lengths if len(check.lengths[n])},
        "rewards": {k: m.to_json() for k, m in sorted(check.rewards.items(), key=lambda x: -x[1].n)},
    }
    if len(gap):
        out["length_and_preference"] = {
            "pairs": len(gap),
            "mean_better": float(better.mean()),
            "mean_worse": float(worse.mean()),
            "share_longer_preferred": float((gap > 0).mean()),
            "share_same_length": float((gap == 0).mean()),
            "correlation_reward_length": _correlation(check.length_reward),
            "margin_by_length_gap": _by_gap(gap[known], margins[known]),
        }
    if check.tokens:
        out["tokens"] = {
            **dict(sorted(check.tokens.items())),
            "prompt_and_longest_response": quantiles(check.longest),
        }
    return out


def histograms(check: Check) -> dict[str, list[tuple[float, float, int]]]:
    """For plots: low, high and count of each bar."""
    series: dict[str, Any] = {
        "Characters of prompts": np.array(check.lengths["prompt"]),
        "Characters of preferred responses": np.array(check.lengths["better"]),
        "Characters of the others": np.array(check.lengths["worse"]),
        "Preferred minus other, characters": np.array(check.lengths["better"], dtype=np.int64)
        - np.array(check.lengths["worse"], dtype=np.int64),
        "Reward of preferred minus other": np.array([m for m in check.margins if math.isfinite(m)]),
        "Tokens of prompt and longest response": np.array(check.longest),
    }
    return {name: _bars(values) for name, values in series.items() if len(values)}


def _bars(values: NDArray[Any]) -> list[tuple[float, float, int]]:
    """Bars between the 0.5 and the 99.5 % quantiles, so that single giants leave the rest visible."""
    low, high = np.quantile(values, [0.005, 0.995])
    counts, edges = np.histogram(
        values, bins=_BUCKETS if high > low else 1, range=(low, high if high > low else low + 1)
    )
    return [(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts)]


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Mean, some quantiles, the greatest."""
    found = np.array(values)
    at = {f"p{q}": float(np.quantile(found, q / 100)) for q in (5, 50, 95, 99)} if len(found) else {}
    return {"mean": float(found.mean()), **at, "max": float(found.max())} if len(found) else {}


def _correlation(s: Sequence[float]) -> float | None:
    n, x, y, xx, yy, xy = s
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else None


def _by_gap(gap: NDArray[np.float64], margins: NDArray[np.float64]) -> list[dict[str, float]]:
    """The mean reward margin in five buckets of equal size by how much longer the preferred response is."""
    order = np.argsort(gap, kind="stable")
    parts = [p for p in np.array_split(order, 5) if len(p)]
    return [
        {"from": float(gap[p].min()), "to": float(gap[p].max()), "pairs": len(p), "margin": float(margins[p].mean())}
        for p in parts
    ]

"""The frontier in words: what each head reaches at each strength, with intervals over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.plan import FAMILIES, family
from harness.stats import Interval, interval

Line = Mapping[str, Any]
COLUMNS = ("head", "strength", "seeds", "reward", "KL", "exactly right", "tokens", "best", "worst")
LEAST_SEEDS = 3  # from which on intervals are over seeds; t over two is no use


@dataclass(frozen=True)
class Point:
    """A head at one strength, over its seeds."""

    head: str
    family: str
    beta: float
    strength: str  # as the recipe says it
    seeds: int
    reward: Interval
    kl: Interval
    exact: Interval
    length: Interval
    best: Interval
    worst: Interval


def frontier(lines: Sequence[Line]) -> tuple[list[Point], dict[str, str]]:
    """Points in the order in which people look for them, and what failed."""
    groups: dict[tuple[str, float], list[Line]] = defaultdict(list)
    failed: dict[str, str] = {}
    for line in lines:
        if "error" in line:
            failed[f"{line['head']} at {line['beta']:g}"] = line["error"]
        else:
            groups[line["head"], line["beta"]].append(line)
    points = [_point(head, beta, found) for (head, beta), found in groups.items()]
    titles = [*FAMILIES, *sorted({p.family for p in points} - set(FAMILIES))]
    return sorted(points, key=lambda p: (titles.index(p.family), p.head, p.beta)), failed


def _point(head: str, beta: float, lines: Sequence[Line]) -> Point:
    def of(name: str) -> Interval:
        values = [line[name] for line in lines]
        if len(values) >= LEAST_SEEDS:
            return interval(values)
        over_questions = [line.get(f"{name}_se", float("nan")) for line in lines]
        return Interval(sum(values) / len(values), 1.96 * sum(over_questions) / len(over_questions))

    term, rate = lines[0]["term"], lines[0]["learning_rate"]
    own = {k: v for k, v in term.items() if k != "head"}
    said = ", ".join(f"{k} {v:g}" for k, v in own.items()) if own else f"learning rate {rate:g}"
    names = ("reward", "kl", "exact", "length", "best", "worst")
    return Point(head, family(head), beta, said, len(lines), *(of(n) for n in names))


def markdown(
    points: Sequence[Point], failed: Mapping[str, str], left_out: Mapping[str, str], base: Mapping[str, float]
) -> str:
    """The report: a table per family, then what failed and what was left out."""
    out = [
        f"The base model earns {base['reward']:.3f} on these questions. KL in nats per answer. best, worst: how far",
        "the log-prob of the base's best and worst answers to other held-out questions moved, in nats per answer.",
        "Intervals: 95 %; t over seeds where there are three, else over questions (without the chance of a run).",
    ]
    for title in dict.fromkeys(p.family for p in points):
        out += ["", f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        out += [_row(p) for p in points if p.family == title]
    for what, found in (("Failed", failed), ("Left out", left_out)):
        if found:
            out += ["", f"{what}:", "", *(f"- {name}: {why}" for name, why in sorted(found.items()))]
    return "\n".join(out) + "\n"


def _row(p: Point) -> str:
    cells = (p.reward.text(), p.kl.text(2), f"{p.exact.mean:.3f}", f"{p.length.mean:.1f}")
    return f"| {p.head} | {p.strength} | {p.seeds} | {' | '.join(cells)} | {p.best.text(1)} | {p.worst.text(1)} |"

"""Which two answers of a scored set make a pair: po.data.layout's rules, windows on the margin, and AIR's rules.

Pure functions over rewards; what is read and written is po.prep.pairs' business.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from po.data.layout import pairs_of
from po.spec import PairRule

Pair = tuple[int, int]  # better, worse
Policy = Literal["on", "off", "mixed"]
NAMES = {  # why a pair is left out, in the order in which that is found
    "tie": "equal rewards",
    "same": "identical answers",
    "margin": "margin outside the window",
    "chosen": "chosen reward too low",
    "policy": "neither on- nor off-policy",
    "per_prompt": "more than --per-prompt",
}


@dataclass(frozen=True)
class Rules:
    """A pair must pass all of them. The defaults let every distinct pair of the rule through.

    AIR (arXiv:2504.03612) is `air()`. Unverified there: the scale of the scores (about 1 to 10), the population's
    variance, and that every pair in the window is kept.
    """

    rule: PairRule = "best_vs_worst"
    least_margin: float = 0.0  # of the two rewards, both ends included
    most_margin: float = math.inf
    least_chosen: float = -math.inf  # the better answer's reward
    most_variance: float = math.inf  # of the rewards of all answers to the prompt
    per_prompt: int | None = None  # at most so many pairs: the widest margins first
    seed: int = 0


def air(seed: int = 0, per_prompt: int | None = None) -> Rules:
    """Variance of at most 1.5 over the models' scores, margins of 2 to 3, a chosen answer of at least 8. The fourth
    rule, as many on-policy as off-policy pairs, concerns all rows together: `balance`."""
    return Rules("all", 2.0, 3.0, 8.0, 1.5, per_prompt, seed)


@dataclass(frozen=True)
class Pairs:
    """The pairs of one set, and why others are not among them: of NAMES the count.

    refused: why the set as a whole gives none.
    """

    pairs: tuple[Pair, ...]
    why: Counter[str]
    refused: str | None = None


def pairs(
    rewards: Sequence[float],
    answers: Sequence[str],
    prompt: str,
    rules: Rules,
    allowed: Callable[[Pair], bool] = lambda _: True,
) -> Pairs:
    """The pairs of a set whose answers are told apart by their text. prompt: best_vs_random draws by it as well."""
    if len(rewards) < 2:
        return Pairs((), Counter(), "fewer than two answers")
    if variance(rewards) > rules.most_variance:
        return Pairs((), Counter(), "variance of the rewards")
    why: Counter[str] = Counter()
    found = []
    for a, b in pairs_of(rewards, rules.rule, lambda k: lot(rules.seed, prompt, answers[k])):
        gap = rewards[a] - rewards[b]
        if gap <= 0:
            why["tie"] += 1
        elif answers[a] == answers[b]:
            why["same"] += 1
        elif not rules.least_margin <= gap <= rules.most_margin:
            why["margin"] += 1
        elif rewards[a] < rules.least_chosen:
            why["chosen"] += 1
        elif not allowed((a, b)):
            why["policy"] += 1
        else:
            found.append((a, b))
    if rules.per_prompt is not None and len(found) > rules.per_prompt:
        why["per_prompt"] += len(found) - rules.per_prompt
        found = sorted(found, key=lambda p: rewards[p[1]] - rewards[p[0]])[: rules.per_prompt]  # stable
    return Pairs(tuple(found), why, None if found else _first_of(why))


def _first_of(why: Counter[str]) -> str:
    """The rule that let a pair come furthest."""
    return next((NAMES[k] for k in reversed(NAMES) if why[k]), "no pair")


def variance(rewards: Sequence[float]) -> float:
    """Of the population."""
    mean = math.fsum(rewards) / len(rewards)
    return math.fsum((r - mean) ** 2 for r in rewards) / len(rewards)


def lot(seed: int, *texts: str) -> bytes:
    """What is drawn by, from seed and content alone."""
    return hashlib.sha256(repr((seed, texts)).encode()).digest()


def number_of(lot: bytes) -> int:
    """A lot as a number of 64 bits."""
    return int.from_bytes(lot[:8], "big")


def policy_of(sources: Sequence[str | None], pair: Pair, own: frozenset[str]) -> Policy:
    """Whether both, neither or one of a pair's answers were written by the models that are named `own`."""
    written = [sources[k] in own for k in pair]
    return "on" if all(written) else "mixed" if any(written) else "off"


@dataclass(frozen=True)
class Balance:
    """Up to which lot a pair of each kind is kept."""

    on: int
    off: int

    def keeps(self, policy: Policy, drawn: int) -> bool:
        """Mixed pairs never pass: they are neither on- nor off-policy."""
        return policy != "mixed" and drawn <= (self.on if policy == "on" else self.off)


def balance(on: Sequence[int], off: Sequence[int], share: float = 0.5) -> Balance:
    """Keep as many pairs as there can be with `share` of them on-policy, by the lots of all pairs of each kind."""
    total = min(len(on) / share if share > 0 else math.inf, len(off) / (1 - share) if share < 1 else math.inf)
    keep_on = min(len(on), round(total * share)) if share > 0 else 0
    keep_off = min(len(off), round(total * (1 - share))) if share < 1 else 0
    return Balance(_threshold(on, keep_on), _threshold(off, keep_off))


def _threshold(lots: Sequence[int], keep: int) -> int:
    return sorted(lots)[keep - 1] if keep else -1

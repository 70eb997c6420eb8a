"""What is wrong with a file of rows: everything that was counted, against a limit that may be set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from po.prep.check import Check
from po.prep.figures import statistics
from po.prep.measure import NEARLY
from po.prep.near import groups
from po.prep.report import LISTED

SHOWN = 5  # examples of a finding
DROPPABLE = (
    *("duplicates", "near_duplicates", "contradictions", "identical_pairs", "nearly_identical_pairs"),
    *("reward_against_choice", "test_prompts", "contaminated"),
)
# Shares of the rows (of the responses, tokens or pairs where the finding says so) that are let pass.
LIMITS = {
    "bad": 0.0,
    "duplicate_ids": 0.0,
    "duplicates": 0.01,
    "near_duplicates": 0.05,
    "identical_pairs": 0.0,
    "nearly_identical_pairs": 0.01,
    "contradictions": 0.01,
    "test_prompts": 0.0,
    "contaminated": 0.0,
    "reward_against_choice": 0.02,
    "text_lost": 0.05,
    "no_end": 0.05,
    "bos": 0.0,
    "boundary": 0.05,
    "eos_inside": 0.0,
}


@dataclass(frozen=True)
class Finding:
    """Something that was counted against a limit."""

    name: str
    says: str
    count: int
    share: float
    limit: float
    examples: tuple[str, ...] = ()
    rows: Sequence[int] = field(default=(), repr=False)  # their numbers, of findings whose rows can be left out

    @property
    def fine(self) -> bool:
        """Whether it is within its limit."""
        return self.share <= self.limit


def findings(check: Check, threshold: float = 0.8, allow: Mapping[str, float] | None = None) -> list[Finding]:
    """Everything that was counted, whether or not it is within its limit."""
    rows, pairs = len(check.places), len(check.margins)
    out = [_found(check, "bad", "bad rows", check.counts["in"], check.problems)]
    ids, first = _repeated(check, "id")
    out.append(_repeats(check, "duplicate_ids", "rows with an id of an earlier row", ids, first))
    again, first = _repeated(check, "content")
    out.append(_repeats(check, "duplicates", "rows with prompt and responses of an earlier row", again, first))
    torn = _contradictions(check)
    if check.signatures:
        leader = groups(check.signatures, threshold)
        near = np.setdiff1d(np.flatnonzero(leader != np.arange(rows)), [*again.tolist(), *torn.rows])
        says = f"further rows about {threshold:.0%} alike or more with an earlier one"
        out.append(_repeats(check, "near_duplicates", says, near, leader))
    out.append(torn)
    out.append(_found(check, "identical_pairs", "pairs of responses that are the same but for case and spaces", pairs))
    out.append(_found(check, "nearly_identical_pairs", f"pairs of responses {NEARLY:.0%} alike or more", pairs))
    scored = int(np.isfinite(np.array(check.margins)).sum())
    out.append(_found(check, "reward_against_choice", "pairs whose chosen response has the lower reward", scored))
    if check.counts["tests"]:
        out.append(_found(check, "test_prompts", "rows with a prompt of the test sets", rows))
        out.append(_found(check, "contaminated", "rows whose prompt shares an n-gram with a test prompt", rows))
    out += _of_tokens(check) if check.tokens else []
    return [replace(f, limit=(allow or {}).get(f.name, f.limit)) for f in out]


def _found(check: Check, name: str, says: str, of: int, lines: Sequence[str] | None = None) -> Finding:
    lines = check.listings.get(name, []) if lines is None else lines
    return _finding(name, says, check.counts[name], of, lines, check.noted.get(name, ()))


def _finding(name: str, says: str, count: int, of: int, lines: Sequence[str], rows: Sequence[int] = ()) -> Finding:
    return Finding(name, says, count, count / of if of else 0.0, LIMITS[name], tuple(lines[:LISTED]), rows)


def _repeated(check: Check, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that have an earlier row's hash, and for each row the first that has its hash."""
    hashes = np.array(check.hashes[name], dtype=np.uint64)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    leader = first[inverse]
    return np.flatnonzero(leader != np.arange(len(hashes))), leader


def _repeats(check: Check, name: str, says: str, rows: NDArray[np.int64], first: NDArray[np.int64]) -> Finding:
    lines = [f"{check.where(n)}: {check.where(int(first[n]))}" for n in rows[:LISTED].tolist()]
    return _finding(name, says, len(rows), len(check.places), lines, rows.tolist())


def _contradictions(check: Check) -> Finding:
    """Rows one of whose claims another row denies: the same two responses the other way round, or another label."""
    claims = np.array(check.claims, dtype=np.uint64)
    owners = np.array(check.claimants, dtype=np.int64)
    _, inverse = np.unique(claims >> np.uint64(1), return_inverse=True)
    total = np.bincount(inverse) if len(inverse) else np.zeros(0)
    up = np.bincount(inverse, weights=(claims & np.uint64(1)).astype(float)) if len(inverse) else total
    torn = ((up > 0) & (up < total))[inverse] if len(inverse) else np.zeros(0, bool)
    at = np.flatnonzero(torn)
    rows, first = np.unique(owners[at], return_index=True)
    by_claim: dict[int, int] = {}
    lines: list[str] = []
    for n, k in sorted(zip(rows.tolist(), at[first].tolist())):
        other = by_claim.setdefault(int(inverse[k]), n)
        if other != n and len(lines) < LISTED:
            lines.append(f"{check.where(n)}: {check.where(other)}")
    says = "rows that prefer or label the same responses the other way than another row"
    return _finding("contradictions", says, len(rows), len(check.places), lines, rows.tolist())


def _of_tokens(check: Check) -> list[Finding]:
    t, rows = check.tokens, len(check.places)
    kept = t["rows_kept"]

    def listed(*names: str) -> list[str]:
        return [line for n in names for line in check.listings.get(f"tokens_{n}", [])]

    cut = listed("overlong", "cut", "empty", "identical")
    return [
        _finding("text_lost", "tokens lost to the length policy", t["tokens_lost"], t["tokens"], cut),
        _finding("boundary", "rows whose prompt tail is scored", t["rows_boundary"], rows, listed("boundary")),
        _finding("no_end", "responses without a stop token at the end", t["responses_without_end"], t["responses"], ()),
        _finding("eos_inside", "text responses with EOS before their end", t["eos_inside"], t["responses"], ()),
        _finding(
            "bos",
            "rows with BOS twice, or without the tokenizer's BOS",
            t["bos_twice"] + t["bos_missing"],
            kept,
            (),
        ),
    ]


def to_json(check: Check, findings: Sequence[Finding], context: Mapping[str, Any]) -> dict[str, Any]:
    """For CI: the verdict, every finding with its limit, the statistics."""
    return {
        "fine": all(f.fine for f in findings),
        "findings": [_finding_json(f) for f in findings],
        "statistics": statistics(check),
        **context,
    }


def _finding_json(f: Finding) -> dict[str, Any]:
    return {k: v for k, v in asdict(replace(f, rows=())).items() if k != "rows"} | {
        "fine": f.fine,
        "examples": f.examples[:SHOWN],
    }


def to_drop(check: Check, findings: Sequence[Finding], names: Sequence[str]) -> dict[str, str]:
    """file:line of the rows that are left out, each with the first of the names that it is counted under."""
    by_name = {f.name: f.rows for f in findings}
    out: dict[str, str] = {}
    for name in names:
        for n in by_name.get(name, ()):
            out.setdefault(check.where(n), name)
    return out

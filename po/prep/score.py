"""Answers scored: by one or several scorers, merged to a reward by a named rule. One row in, at most one out."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, get_args

from po.data.read import Record
from po.data.report import NOTHING, Problem
from po.prep.judge import Cell, Lacking, judged
from po.prep.merge import Merging, merge
from po.prep.rows import UNSCORED, ScoredSet, read_set
from po.prep.scorers import GIVEN, Entry, Scorers, ready
from po.prep.step import Outcome
from po.rewards import Rewards, Scored
from po.rewards.cells import Kind
from po.spec import Source

Missing = Literal["bad", "drop-row", "drop-response"]
Given = Literal["refuse", "keep", "merge", "replace"]

_OURS = ("prompt", "completion", "completions", "completion_ids")
_KINDS = (*get_args(Kind), "none")


@dataclass(frozen=True)
class Build:
    """Makes a Score ready, in this process or in an actor. args: the script's."""

    source: Source
    entries: tuple[Entry, ...]
    args: argparse.Namespace

    def __call__(self) -> Score:
        """Models loaded, processes started."""
        scorers = ready(self.entries, self.args)
        return Score(self.source, scorers, self.args.merge, self.args.missing, self.args.given)


@dataclass(frozen=True)
class _Work:
    """A row on its way."""

    record: Record
    read: ScoredSet
    cells: dict[str, list[Cell]]  # by scorer
    sums: Counter[str]


class Score:
    """The batch_work of score.py."""

    def __init__(
        self, source: Source, scorers: Scorers, rule: Merging, missing: Missing = "bad", given: Given = "refuse"
    ) -> None:
        self._source, self._scorers, self._missing, self._given = source, scorers, missing, given
        self._rule = rule
        self._weights = scorers.weights | ({GIVEN: 1.0 if given == "merge" else 0.0} if given != "replace" else {})
        if rule == "first":
            first = next((n for n, w in self._weights.items() if w != 0), None)
            self._weights = {n: w if n == first else 0.0 for n, w in self._weights.items()}

    def close(self) -> None:
        """End the processes of rewards."""
        self._scorers.close()

    def __call__(self, records: Sequence[Record]) -> list[Outcome]:
        """An outcome for each, in order."""
        read = [self._read(r) for r in records]
        work = [w for w in read if isinstance(w, _Work)]
        if self._scorers.rewards is not None and work:
            self._reward(self._scorers.rewards, work)
        for judge in self._scorers.judges:
            named = judge.spec.best_by
            best = [None if named is None else _best(w.cells.get(named)) for w in work]
            able = [i for i, b in enumerate(best) if named is None or b is not None]
            done = iter(judged(judge, [work[i].read for i in able], [best[i] for i in able]))
            for i, w in enumerate(work):
                cells, sums = next(done) if i in able else (_unknown(w.read, str(named)), {})
                w.cells[judge.name] = cells
                w.sums.update(sums)
        return [self._outcome(w) if isinstance(w, _Work) else w for w in read]

    def _read(self, record: Record) -> _Work | Outcome:
        found = read_set(record, self._source, UNSCORED)
        if isinstance(found, tuple):
            return Outcome(problem=found)
        own = [r.reward for r in found.row.responses]
        cells: dict[str, list[Cell]] = {}
        if any(r is not None for r in own):
            if self._given == "refuse":
                say = "no rewards yet (or --given keep, merge or replace)"
                return Outcome(problem=Problem(record.where, "reward", say, f"{own[0]} on the first response"))
            cells = {} if self._given == "replace" else {GIVEN: list(own)}
        rewards = self._scorers.rewards
        for name in sorted(rewards.columns if rewards is not None else ()):
            if name not in found.fields and name not in (record.data or {}):
                return Outcome(problem=Problem(record.where, name, "a value, which a scorer reads", NOTHING))
        return _Work(record, found, cells, Counter())

    def _reward(self, rewards: Rewards, work: Sequence[_Work]) -> None:
        """All answers of all rows in one call."""
        flat = [(g, r) for g, w in enumerate(work) for r in w.read.row.responses]
        records = [json.loads(json.dumps({**(w.record.data or {}), **w.read.fields}, default=str)) for w in work]
        names = sorted({name for r in records for name in r if name not in _OURS})
        ids = [r.token_ids for _, r in flat]
        before = Counter(rewards.counts)
        scored = iter(
            rewards(
                [records[g]["prompt"] for g, _ in flat],
                [r.content if isinstance(r.content, str) else list(r.content) for _, r in flat],
                [list(i) for i in ids if i is not None] if all(i is not None for i in ids) else None,
                {name: [records[g].get(name) for g, _ in flat] for name in names},
                [g for g, _ in flat],
            )
        )
        for w in work:
            found = [next(scored) for _ in w.read.row.responses]
            w.cells.update({name: [_cell(s, name) for s in found] for name in rewards.names})
        own = rewards.counts - before
        work[0].sums.update({k.replace("/", ": ", 1): n for k, n in own.items() if k.rpartition("/")[2] not in _KINDS
                             and k != "unscored"})  # fmt: skip

    def _outcome(self, w: _Work) -> Outcome:
        """The row with its rewards, or what becomes of it without."""
        n, sums = len(w.read.answers), Counter(w.sums)
        order = [name for name in self._weights if name in w.cells]
        applies = [name for name in order if any(c is not None for c in w.cells[name])]
        sums.update(f"{name}: rows it does not apply to" for name in order if name not in applies)
        lacks = [(name, said) for name in applies for c in w.cells[name] if (said := _lacks(c))]
        sums.update(f"{name}: no score ({said.kind})" for name, said in lacks)
        merged = [name for name in applies if self._weights[name] != 0]
        lacking = {k: [(m, said) for m in merged if (said := _lacks(w.cells[m][k]))] for k in range(n)}
        if not merged:
            lacking = {k: [("any scorer", Lacking("none applies"))] for k in range(n)}
        left = {k: why for k, why in lacking.items() if why}
        kept = [k for k in range(n) if k not in left]
        if left and self._missing == "bad":
            found = [_problem(w.record.where, k, *one) for k, why in left.items() for one in why]
            return Outcome(problem=found, sums=dict(sums))
        if left and (self._missing == "drop-row" or w.read.row.chosen_first or len(kept) < min(2, n)):
            name, why = next(iter(left.values()))[0]
            return Outcome(dropped=f"no score from {name} ({why.kind})", sums=dict(sums))
        if len(kept) == 1 and self._rule in ("zscore", "rank"):
            return Outcome(dropped=f"{self._rule} compares answers, and there is one", sums=dict(sums))
        sums["answers left out: no score"] += len(left)
        return Outcome((self._row(w, kept, applies, merged, left, sums),), sums={k: v for k, v in sums.items() if v})

    def _row(
        self,
        w: _Work,
        kept: Sequence[int],
        applies: Sequence[str],
        merged: Sequence[str],
        left: Mapping[int, Sequence[tuple[str, Lacking]]],
        sums: Counter[str],
    ) -> dict[str, Any]:
        whole = [name for name in applies if not any(_lacks(w.cells[name][k]) for k in kept)]
        numbers: dict[str, list[float]] = {name: [w.cells[name][k] for k in kept] for name in whole}  # type: ignore[misc]
        rewards = merge(self._rule, [numbers[m] for m in merged], [self._weights[m] for m in merged])
        sums["mean reward"] += fmean(rewards)  # type: ignore[assignment]
        answers = []
        for i, k in enumerate(kept):
            before = {} if self._given == "replace" else _before(w.read, k)
            scores = before | {name: of[i] for name, of in numbers.items()}
            answers.append({**w.read.answers[k], "reward": rewards[i], "scores": scores})
        more: dict[str, Any] = {}
        judges = [j for j in self._scorers.judges if j.name in whole]
        if judges:
            more["judge"] = {j.name: j.said for j in judges}
        if left:
            more["unscored"] = [
                {"content": w.read.row.responses[k].content, "scorer": name, "why": f"{why.kind}: {why.text}"}
                for k, of in left.items()
                for name, why in of
            ]
        if not w.read.row.chosen_first:
            return w.read.with_answers(answers, **more)
        shares = [numbers[j.name][0] for j in judges if j.spec.judge == "pairwise"]
        if shares:
            more["preference"] = fmean(shares)
        sums["pairs whose chosen answer has the lower reward"] += rewards[0] < rewards[1]
        sums["pairs with equal rewards"] += rewards[0] == rewards[1]
        return replace(w.read, answers=tuple(answers)).as_pair(0, 1, **more)


def _cell(scored: Scored, name: str) -> Cell:
    """What one reward says of a completion. A failure is told from None by the problem that names it."""
    value = scored.parts[name]
    if value is not None:
        return value
    for kind in get_args(Kind):
        for problem in scored.problems:
            if problem.startswith(f"{name}/{kind}: "):
                return Lacking(kind, problem.removeprefix(f"{name}/{kind}: "))
    return None


def _lacks(cell: Cell) -> Lacking | None:
    """None beside numbers of the same scorer is a lack too: the reward would be of other scorers than the rest's."""
    if cell is None:
        return Lacking("does not apply to this answer alone")
    return cell if isinstance(cell, Lacking) else None


def _best(cells: Sequence[Cell] | None) -> int | None:
    """The answer with the highest score; the first among equals. None where a score is missing."""
    numbers = [c for c in cells or () if isinstance(c, float)]
    return numbers.index(max(numbers)) if numbers and len(numbers) == len(cells or ()) else None


def _unknown(read: ScoredSet, named: str) -> list[Cell]:
    return [Lacking("best answer unknown", f"{named} has no score for every answer")] * len(read.answers)


def _before(read: ScoredSet, k: int) -> dict[str, Any]:
    """The scores that an answer already has, by name."""
    beside = read.fields.get(f"{('chosen', 'rejected')[k]}_scores") if read.row.chosen_first else None
    found = read.answers[k].get("scores", beside)
    if isinstance(found, list | tuple):
        found = {str(i): s for i, s in enumerate(found)}
    return dict(found) if isinstance(found, dict) else {}


def _problem(where: str, k: int, name: str, why: Lacking) -> Problem:
    return Problem(where, f"responses[{k}]", f"a score from {name}", f"{why.kind}: {why.text}".removesuffix(": "))

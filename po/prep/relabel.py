"""Pairs and answers whose labels are mended or made: one input row to at most one row."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from po.data.read import Record
from po.data.report import Problem
from po.prep.pairing import lot
from po.prep.pseudo import Scores, labels
from po.prep.rows import ScoredSet, numbers, read_set
from po.prep.step import Outcome
from po.prep.strength import Bands, Strength, mend
from po.spec import Source


@dataclass(frozen=True)
class ByStrength:
    """Pairs mended by an ensemble's margins: the row's `margins`, else the difference of its answers' `scores`."""

    source: Source
    bands: Bands
    smoothing: float = 0.1

    def __call__(self, record: Record) -> Outcome:
        """chosen and rejected, turned over where that is the way; with strength, strength_std and preference."""
        read = self.read(record)
        if not isinstance(read, tuple):
            return Outcome(problem=read)
        pair, margins = read
        found = Strength.of(margins)
        way = self.bands.way(found.mean)
        done = mend(found.mean, way, self.smoothing)
        sums = {f"pairs: {way}": 1.0}
        if done is None:
            return Outcome(dropped="strength too low", sums=sums)
        row = pair.as_pair(0, 1)
        if done.flipped:
            row = turned(row)
            sums["pairs turned over"] = 1.0
        said = {"flipped": done.flipped, "strength": done.margin, "strength_std": found.std}
        return Outcome(({**row, **said, "preference": done.preference},), sums=sums)

    def read(self, record: Record) -> tuple[ScoredSet, list[float]] | Problem | list[Problem]:
        """The pair and its margins, or what is wrong."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return list(read)
        if not read.row.is_pair:
            return Problem(record.where, "", "a pair (make them with pair.py)", "no chosen and rejected")
        if "margins" in read.fields:
            found = numbers(record.where, "margins", read.fields["margins"])
            return found if isinstance(found, Problem) else (read, found)
        sides = []
        for side, answer in zip(("chosen", "rejected"), read.answers):
            given = read.fields.get(f"{side}_scores", answer.get("scores"))
            one = numbers(record.where, f"{side}_scores", given)
            if isinstance(one, Problem):
                return one
            sides.append(one)
        if len(sides[0]) != len(sides[1]):
            return Problem(record.where, "rejected_scores", f"{len(sides[0])} numbers, as chosen_scores", "others")
        return read, [c - r for c, r in zip(*sides)]


def strengths(records: Iterable[Record], work: ByStrength) -> array[float]:
    """Read everything once: the strength of every pair. 8 bytes of memory a pair."""
    found = array("d")
    for record in records:
        read = work.read(record) if record.data is not None else None
        if isinstance(read, tuple):
            found.append(Strength.of(read[1]).mean)
    return found


_SIDE = re.compile(r"^(?:(chosen|rejected)(?=$|[_-])|(.*[_-])(chosen|rejected)$)")
_OTHER = {"chosen": "rejected", "rejected": "chosen"}


def turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair with its sides exchanged, in every field that is named after one; `margins` change their sign."""
    out = {}
    for name, value in row.items():
        found = _SIDE.match(name)
        if found and found[1]:
            name = _OTHER[found[1]] + name[len(found[1]) :]
        elif found:
            name = found[2] + _OTHER[found[3]]
        out[name] = value
    if isinstance(out.get("margins"), list):
        out["margins"] = [-x for x in out["margins"]]
    elif isinstance(out.get("margins"), dict):
        out["margins"] = {k: -x for k, x in out["margins"].items()}
    return out


@dataclass(frozen=True)
class PseudoLabel:
    """SSPO: answers without a label get one by their score. score: the field of each answer that holds it."""

    source: Source
    threshold: float
    score: str = "reward"
    band: float = 0.0

    def __call__(self, record: Record) -> Outcome:
        """Rows with labels, and pairs, stay as they are; of others each answer gets a label and `pseudo`."""
        read = read_set(_labelled(record), self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        if known(read):
            return Outcome((dict(record.data or {}),), sums={"rows with labels of their own": 1})
        scores = scores_of(read, self.score)
        if any(s is None for s in scores):
            return Outcome(dropped=f"no {self.score} on every answer")
        made = labels([s for s in scores if s is not None], self.threshold, self.band)
        mine = [r.label in (None, 0) for r in read.row.responses]
        answers = [
            {**a, "label": label, "pseudo": label is not None} if free else dict(a)
            for a, label, free in zip(read.answers, made, mine)
        ]
        given = [label for label, free in zip(made, mine) if free]
        names = {True: "desirable", False: "undesirable", None: "too near to the threshold"}
        sums = {f"answers {name}": float(given.count(value)) for value, name in names.items()}
        return Outcome((read.with_answers(answers),), sums=sums)


def _labelled(record: Record) -> Record:
    """A single answer without a word about its label is unlabelled here, no demonstration."""
    data = record.data or {}
    single = not any(k in data for k in ("responses", "completions", "answers", "chosen", "rejected"))
    return Record(record.where, {"label": None, **data}) if single else record


def known(read: ScoredSet) -> bool:
    """Whether the row says of all its answers what they are."""
    return read.row.is_pair or all(r.label not in (None, 0) for r in read.row.responses)


def scores_of(read: ScoredSet, field: str) -> list[float | None]:
    """The score of each answer; a pair's may stand beside it as chosen_FIELD and rejected_FIELD."""
    said = [a.get(field) for a in read.answers]
    if read.row.is_pair:
        said = [read.fields.get(f"{side}_{field}", s) for side, s in zip(("chosen", "rejected"), said)]
    elif len(said) == 1 and said[0] is None:
        said = [read.fields.get(field)]
    return [float(s) if _number(s) else None for s in said]  # type: ignore[arg-type]


def learn(records: Iterable[Record], source: Source, field: str) -> Scores:
    """Read everything once: the scores of the answers whose labels are known."""
    found = Scores()
    for record in records:
        read = read_set(_labelled(record), source) if record.data is not None else ()
        if not isinstance(read, ScoredSet):
            continue
        signs = [1, -1] if read.row.is_pair else [r.label for r in read.row.responses]
        for k, (sign, score) in enumerate(zip(signs, scores_of(read, field))):
            if sign and score is not None:
                found.add(score, sign > 0, lot(0, record.where, str(k))[:8])
    return found


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

"""Which answers of a row stay (AMPO), what they weigh (MPO), and which rows are worth a label: one row to one row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from po.data.read import Record
from po.data.report import Problem
from po.prep import uncertainty
from po.prep.embed import embed
from po.prep.medoids import ENUMERATED, Medoids
from po.prep.pairing import lot
from po.prep.rows import ScoredSet, numbers, read_set
from po.prep.step import Outcome
from po.prep.subsets import best_of, bottom_k, coreset, deviation_weights, opt_select, without_median
from po.prep.uncertainty import Measure, Most
from po.spec import Source

Rule = Literal["bottom_k", "coreset", "opt_select"]


@dataclass(frozen=True)
class Negatives:
    """AMPO: the best answer and k of the others."""

    source: Source
    rule: Rule
    k: int
    embedder: str | None = None
    max_tokens: int = 512
    enumerated: int = ENUMERATED
    seed: int = 0

    def __call__(self, record: Record) -> Outcome:
        """The row with 1 + k answers in their order; `selection` says how they were chosen."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        rewards = read.rewards
        if rewards is None:
            return Outcome(dropped="no reward or label on every answer")
        if len(set(rewards)) < 2:
            return Outcome(dropped="equal rewards")
        if len(rewards) <= self.k:
            return Outcome(dropped=f"fewer than {self.k} other answers")
        try:
            chosen, said, sums = self._choose(read, rewards)
        except ValueError as e:
            return Outcome(problem=Problem(record.where, "responses", "answers to choose from", str(e)))
        kept = sorted({best_of(rewards), *chosen})
        said = {"rule": self.rule, "kept": kept, "of": len(rewards), **said}
        return Outcome((read.with_answers([read.answers[i] for i in kept], selection=said),), sums=sums)

    def _choose(
        self, read: ScoredSet, rewards: Sequence[float]
    ) -> tuple[Sequence[int], dict[str, Any], dict[str, float]]:
        if self.rule == "bottom_k":
            return bottom_k(rewards, self.k), {}, {}
        at = embeddings(read, self.embedder, self.max_tokens)
        if self.rule == "coreset":
            drawn = lot(self.seed, str(read.row.prompt), *read.texts)
            return coreset(rewards, at, self.k, drawn), {}, {}
        found = opt_select(rewards, at, self.k, self.enumerated)
        said = {"cost": found.cost, "gap": found.gap, "exact": found.exact}
        return found.chosen, said, {_grade(found): 1, "sum of the gaps": found.gap}


def _grade(found: Medoids) -> str:
    if found.exact:
        return "chosen exactly (every subset tried)"
    size = "no gap" if found.gap < 1e-6 else "gap up to 1 %" if found.gap <= 0.01 else "gap above 1 %"
    return f"chosen by local search, {size}"


def embeddings(read: ScoredSet, embedder: str | None, max_tokens: int) -> Sequence[Sequence[float]]:
    """Those that the answers bring, else the embedder's. ValueError where there are none, or of several lengths."""
    own = [r.embedding for r in read.row.responses]
    if embedder is not None:
        return embed(read.texts, embedder, max_tokens)
    given = [e for e in own if e is not None]
    if len(given) < len(own):
        raise ValueError("no embedding on every answer; add them, or name a model with --embedder")
    if len({len(e) for e in given}) > 1:
        raise ValueError("embeddings of several lengths")
    return given


@dataclass(frozen=True)
class Weights:
    """MPO: a weight for each answer by its deviation from the mean reward; optionally without the median answer."""

    source: Source
    alpha: float = 1.0
    power: int = 1
    signed: bool = False
    standardize: bool = False
    drop_median: bool = False

    def __call__(self, record: Record) -> Outcome:
        """The row with a number `weight` on each answer that stays. The weights are those of the whole row's mean."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        rewards = read.rewards
        if rewards is None:
            return Outcome(dropped="no reward or label on every answer")
        if len(set(rewards)) < 2:
            return Outcome(dropped="equal rewards")
        keep = without_median(rewards) if self.drop_median and len(rewards) > 2 else range(len(rewards))
        try:
            weights = deviation_weights(rewards, self.alpha, self.power, self.signed, self.standardize)
        except ValueError as e:
            return Outcome(problem=Problem(record.where, "responses", "rewards to weigh by", str(e)))
        return Outcome((read.with_answers([{**read.answers[i], "weight": weights[i]} for i in keep]),))


@dataclass(frozen=True)
class Unsure:
    """Rows by how unsure their preference is. least: what `most` found; None: every row, with its number."""

    source: Source
    measure: Measure
    scale: float = 1.0
    scores: str = "scores"
    least: tuple[float, bytes] | None = None

    def __call__(self, record: Record) -> Outcome:
        """The row with a number `uncertainty`, where it is among the most uncertain."""
        read = read_set(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        value = self.value(read, record.where)
        if isinstance(value, Problem):
            return Outcome(problem=value)
        if value is None:
            return Outcome(dropped="no reward on two answers or more")
        if self.least is not None and (value, _lot(record)) < self.least:
            return Outcome(dropped="surer than those that were chosen")
        return Outcome((read.with_answers(read.answers, uncertainty=value),))

    def value(self, read: ScoredSet, where: str) -> float | Problem | None:
        """None: nothing to compare."""
        if len(read.answers) < 2:
            return None
        if self.measure in ("margin", "entropy"):
            rewards = read.rewards
            if rewards is None:
                return None
            return uncertainty.margin(rewards) if self.measure == "margin" else uncertainty.entropy(rewards, self.scale)
        given = [_numbers(where, k, a, self.scores) for k, a in enumerate(read.answers)]
        by_scorer = [g for g in given if not isinstance(g, Problem)]
        for g in given:
            if isinstance(g, Problem):
                return g
        if len({len(g) for g in by_scorer}) > 1:
            return Problem(where, self.scores, "as many scores on each answer", str([len(g) for g in by_scorer]))
        scorers = list(zip(*by_scorer))
        return uncertainty.spread(scorers) if self.measure == "spread" else uncertainty.disagreement(scorers)


def _numbers(where: str, k: int, answer: Mapping[str, Any], field: str) -> list[float] | Problem:
    return numbers(where, f"responses[{k}].{field}", answer.get(field))


def _lot(record: Record) -> bytes:
    return lot(0, record.where)[:8]


def most(records: Iterable[Record], work: Unsure, budget: int) -> Most:
    """Read everything once, to know which rows are the most uncertain. Memory for `budget` numbers."""
    found = Most(budget)
    for record in records:
        read = read_set(record, work.source) if record.data is not None else ()
        value = work.value(read, record.where) if isinstance(read, ScoredSet) else None
        if isinstance(value, float):
            found.add(value, _lot(record))
    return found

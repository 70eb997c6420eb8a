"""PU-RL: a model ranks its own answers by comparing them with one good answer, the anchor.

Positive-Unlabeled Reinforcement Learning Distillation, arXiv:2601.20687. Unverified, as only the abstract was at hand:
how answers are compared, that the orders are averaged and ranks normalised, what weight the anchor has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from po.data.read import Record
from po.data.report import NOTHING, Problem, describe
from po.prep.asking import (
    Left,
    Rounds,
    as_text,
    complete,
    conversation,
    plain,
    read_answers,
    said,
    say,
    seeded,
    settled,
    switched,
    without_tokens,
    written,
)
from po.prep.chat import Answer, Ask
from po.prep.contrast import Sampling, contrast, whole
from po.prep.prompts import Prompt
from po.prep.rows import ScoredSet
from po.prep.search_prompts import EACH_OTHER, WITH_ANCHOR
from po.prep.second import Second
from po.prep.step import Outcome
from po.prep.verdicts import p_yes
from po.rewards.group import anchor_ranking, pairwise_ranking
from po.spec import Source

Compare = Literal["anchor", "each_other"]


@dataclass(frozen=True)
class PURL:
    """The work of one row: a prompt's candidates and its anchor.

    anchor: the field that holds it (`chosen` of a pair is one); None: the second model, the teacher, is asked for it.
    sample: so many candidates from the model; 0: the row's own responses. weight: the anchor's as an extra positive,
    the candidates having 1; 0 leaves it out.
    """

    source: Source
    model: str
    anchor: str | None = "anchor"
    teacher: str | None = None  # its name, for `source`
    sample: int = 0
    compare: Compare = "anchor"
    weight: float = 1.0
    form: Literal["responses", "pair"] = "responses"
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))  # of candidates and the teacher
    with_anchor: Prompt = WITH_ANCHOR
    each_other: Prompt = EACH_OTHER

    def __call__(self, record: Record) -> Rounds:
        """Rounds of requests, and at their end the Outcome."""
        read = read_answers(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        given = None if self.anchor is None else self._given(read)
        if self.anchor is not None and given is None:
            got = describe(read.fields.get(self.anchor, NOTHING))
            return Outcome(problem=Problem(record.where, self.anchor, "the anchor, as text", got))
        return (yield from settled(read, partial(self._rows, given)))

    def _given(self, read: ScoredSet) -> str | None:
        if self.anchor == "chosen" and read.row.chosen_first:
            return said(read.answers[0]["content"])
        text = said(read.fields.get(str(self.anchor)))
        return text if text and text.strip() else None

    def _rows(
        self, given: str | None, read: ScoredSet, counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], list[dict[str, Any]]]:
        task = as_text(read.row)
        anchor, candidates = yield from self._answers(read, given, counts)
        texts = [str(said(c["content"])) for c in candidates]
        found = yield from self._ranked(task, anchor, texts, counts)
        best = [{**c, "reward": found[k]} for k, c in enumerate(candidates) if k in found]
        if len(best) < 2:
            raise Left("fewer than two candidates that could be compared")
        counts["candidates"] += len(best)
        good = {"content": written(read.row, anchor), "source": self.teacher or "anchor", "anchor": True}
        if self.form == "pair":
            return self._pairs(read, best, good)
        if self.weight:
            best = [plain(c, reward=c["reward"], weight=1.0) for c in best]
            best.append({**good, "reward": 1.0, "weight": self.weight})
        prompt = self.with_anchor if self.compare == "anchor" else self.each_other
        how = {"strategy": "pu_rl", "prompts": [prompt.said]}
        bare = without_tokens(read.fields) if self.weight or self.sample else read.fields
        fields = {k: v for k, v in bare.items() if k != self.anchor or not self.weight}
        return [{**fields, "contrast": how, "responses": best}]

    def _pairs(self, read: ScoredSet, ranked: Sequence[dict[str, Any]], good: dict[str, Any]) -> list[dict[str, Any]]:
        """The best candidate over the worst, and the anchor over the worst."""
        best, worst = (choose(ranked, key=lambda c: c["reward"]) for choose in (max, min))
        if best["reward"] == worst["reward"]:
            raise Left("equal scores")
        prompt = self.with_anchor if self.compare == "anchor" else self.each_other
        sides = [(plain(best, reward=best["reward"]), "best-worst", 1.0), (good, "anchor-worst", self.weight)]
        return [
            {**contrast(read, "pu_rl", better, plain(worst), [prompt]), "id": f"{read.row.id}/{name}", "weight": weight}
            for better, name, weight in sides
            if weight
        ]

    def _answers(
        self, read: ScoredSet, given: str | None, counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], tuple[str, list[dict[str, Any]]]]:
        """The anchor and the candidates: what the row has, and what is asked for in one round."""
        messages = conversation(read.row)
        asks = [] if given is not None else [self.sampling.ask(messages, "teacher", kind=Second)]
        asks += [self.sampling.ask(messages, n=self.sample)] if self.sample else []
        answers = yield from complete([switched(read.row, a) for a in asks])
        anchor = given if given is not None else whole(answers[0].replies[0])
        if self.sample:
            texts = [r.text.strip() for r in answers[-1].replies if r.finish_reason != "length"]
            fresh = [t for t in dict.fromkeys(texts) if t and t != anchor]
            counts["candidates cut, empty or the same as another"] += self.sample - len(fresh)
            return anchor, [{"content": written(read.row, t), "source": self.model} for t in fresh]
        own = read.answers[1:] if self.anchor == "chosen" and read.row.chosen_first else read.answers
        kept = [dict(a) for a in own if said(a["content"]) not in (None, anchor)]
        counts["candidates of more than text, or the same as the anchor"] += len(own) - len(kept)
        return anchor, kept

    def _ranked(
        self, task: str, anchor: str, texts: Sequence[str], counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], dict[int, float]]:
        """Rewards by candidate; one whose comparisons have neither yes nor no has none."""
        if len(texts) < 2:
            raise Left("fewer than two candidates")
        if self.compare == "anchor":
            filled = [
                self.with_anchor.fill(task=task, place=place, first=first, second=second)
                for t in texts
                for place, first, second in (("first", t, anchor), ("second", anchor, t))
            ]
            said_ = yield from self._compared(filled, counts)
            both = {k: (said_[2 * k], said_[2 * k + 1]) for k in range(len(texts))}
            whole = {k: (a, b) for k, (a, b) in both.items() if a is not None and b is not None}
            rewards, alike = anchor_ranking([a for a, _ in whole.values()], [b for _, b in whole.values()])
            counts["candidates whose two orders disagree"] += alike.count(False)
            return dict(zip(whole, rewards, strict=True))
        places = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
        filled = [self.each_other.fill(task=task, anchor=anchor, first=texts[i], second=texts[j]) for i, j in places]
        said_ = yield from self._compared(filled, counts)
        if None in said_:
            raise Left("a comparison with neither yes nor no")
        better = [[0.0] * len(texts) for _ in texts]
        for (i, j), p in zip(places, said_, strict=True):
            better[i][j] = p or 0.0
        rewards, agree = pairwise_ranking(better)
        counts["pairs of candidates whose two orders disagree"] += round((1 - agree) * len(places) / 2)
        return dict(enumerate(rewards))

    def _compared(
        self, filled: Sequence[str], counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], list[float | None]]:
        """P(yes) of each comparison, from the log-probs of the first token."""
        asks = [Ask(messages=say(t), max_tokens=1, top_logprobs=20, seed=seeded(self.sampling.seed, t)) for t in filled]
        answers = yield from complete(asks)
        found = [p_yes(a.replies[0].top) for a in answers]
        counts["comparisons"] += len(found)
        counts["comparisons with neither yes nor no"] += found.count(None)
        return found

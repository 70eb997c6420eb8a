"""PopAlign: pairs whose two answers were made under contrasting circumstances, one per strategy, and kept without them.

Wang et al. 2024, PopAlign: Diversifying Contrasting Patterns for a More Comprehensive Alignment, arXiv:2410.13785; no
code was published. prefix, demon and elicitive put a system text before the row's prompt (a manner, examples, think
first) that asks for a good answer, or for a bad one; refine prefers a second turn's answer to the first one's; nparam
and leaderboard prefer a stronger model's answer. Unverified: the authors' texts (these are ours), temperature, and that
demonstrations stand in the system text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from po.data.read import Record
from po.prep.asking import Left, Rounds, complete, conversation, said, settled, written
from po.prep.chat import Answer, Ask, Reply
from po.prep.contrast import Sampling, after, contrast, whole
from po.prep.contrast_prompts import POPALIGN
from po.prep.prompts import Prompt
from po.prep.rows import PROMPTS, ScoredSet, read_set
from po.prep.second import Second
from po.prep.texts import Tests, normal
from po.spec import Source

Strategy = Literal["prefix", "demon", "elicitive", "nparam", "leaderboard", "refine"]
Messages = tuple[Mapping[str, str], ...]
Side = tuple[str, str]  # a text, who wrote it
ASKED = ("prefix", "demon", "elicitive")  # for a good answer and for a bad one
MODELS = ("nparam", "leaderboard")
_REPEATED = 8  # words in a row of an instruction that an answer must not have


@dataclass(frozen=True)
class PopAlign:
    """models: the names of the model and of the weaker one, which is the second (po.prep.second). given: for nparam and
    leaderboard the sources of the better and the worse among the row's own answers, which then are not asked for."""

    source: Source
    strategies: Sequence[Strategy]
    models: tuple[str, str] = ("", "")
    given: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    prompts: Mapping[str, Prompt] = field(default_factory=lambda: {p.id: p for p in POPALIGN})
    sampling: Sampling = field(default_factory=Sampling)

    def __call__(self, record: Record) -> Rounds:
        """One or two rounds of requests, at most one row per strategy."""
        return settled(read_set(record, self.source, PROMPTS), self._rounds)

    def _rounds(self, read: ScoredSet, counts: Counter[str]) -> Rounds:
        talk = conversation(read.row)
        asks = {name: self._like(read, ask) for name, ask in self._asks(talk).items()}
        answers = dict(zip(asks, (yield from complete(list(asks.values())))))
        if "refine" in self.strategies and usable(answers["plain"].replies[0]):
            turns = (("assistant", answers["plain"].replies[0].text), ("user", self.prompts["refine"].text))
            more = (*talk, *({"role": role, "content": text} for role, text in turns))
            (answers["refined"],) = yield from complete([self._like(read, self.sampling.ask(more, "refined"))])
        rows, reasons = [], []
        for strategy in self.strategies:
            try:
                rows.append(self._row(read, strategy, answers))
                counts[f"pairs: {strategy}"] += 1
            except Left as e:
                reasons.append(str(e))
                counts[f"{strategy}: {e}"] += 1
        if not rows:
            raise Left(reasons[0] if len(set(reasons)) == 1 else "no strategy gave a pair")
        return rows

    def _like(self, read: ScoredSet, ask: Ask) -> Ask:
        """A request with the row's tools and switches of the chat template."""
        return replace(ask, tools=read.row.tools or (), template_kwargs=read.row.template_kwargs)

    def _asks(self, talk: Messages) -> dict[str, Ask]:
        """By name: the strategies' two sides, the plain answer (once for all that need it), the weaker model's."""
        asks = {}
        for name in (f"{s}-{side}" for s in self.strategies if s in ASKED for side in ("good", "bad")):
            asks[name] = self.sampling.ask(led(self.prompts[name].text, talk), name)
        compared = [s for s in self.strategies if s in MODELS and s not in self.given]
        if compared or "refine" in self.strategies:
            asks["plain"] = self.sampling.ask(talk, "plain")
        if compared:
            asks["weak"] = self.sampling.ask(talk, "weak", kind=Second)
        return asks

    def _row(self, read: ScoredSet, strategy: Strategy, answers: Mapping[str, Answer]) -> dict[str, Any]:
        prompts = [self.prompts[n] for n in (f"{strategy}-good", f"{strategy}-bad", strategy) if n in self.prompts]
        better, worse = self._sides(read, strategy, answers)
        if normal(better[0]) == normal(worse[0]):
            raise Left("the same answer twice")
        seen = Tests(_REPEATED)
        for prompt in prompts:
            seen.add(prompt.text, prompt.id)
        if any(seen.overlap(text) for text, _ in (better, worse)):
            raise Left("repeats its instruction")
        chosen, rejected = ({"content": written(read.row, text), "source": who} for text, who in (better, worse))
        return contrast(read, strategy, chosen, rejected, prompts)

    def _sides(self, read: ScoredSet, strategy: Strategy, answers: Mapping[str, Answer]) -> tuple[Side, Side]:
        """The better and the worse answer, without what brought them about."""
        if strategy in self.given:
            good, bad = (own(read, who) for who in self.given[strategy])
            return (good, self.given[strategy][0]), (bad, self.given[strategy][1])
        strong, weak = self.models
        if strategy in MODELS:
            return (self._text("plain", answers), strong), (self._text("weak", answers), weak)
        if strategy == "refine":
            first = self._text("plain", answers)
            return (self._text("refined", answers, "refine"), strong), (first, strong)
        good, bad = (self._text(f"{strategy}-{side}", answers, f"{strategy}-{side}") for side in ("good", "bad"))
        return (good, strong), (bad, strong)

    def _text(self, name: str, answers: Mapping[str, Answer], prompt: str | None = None) -> str:
        """A reply; where its prompt asked for a marker, what stands behind that."""
        reply = answers[name].replies[0]
        marker = self.prompts[prompt].marker if prompt else ""
        return after(marker, reply) if marker else whole(reply)


def usable(reply: Reply) -> bool:
    """Whether there is any use in asking on from it."""
    return bool(reply.text.strip()) and reply.finish_reason != "length"


def led(text: str, talk: Messages) -> Messages:
    """A conversation with a text put before it, joined to its system message where it has one."""
    if talk[0]["role"] == "system":
        return ({"role": "system", "content": f"{text}\n\n{talk[0]['content']}"}, *talk[1:])
    return ({"role": "system", "content": text}, *talk)


def own(read: ScoredSet, who: str) -> str:
    """The first of the row's own answers by that model. Left where it has none."""
    for k, source in enumerate(read.sources):
        if source == who:
            return said(read.row.responses[k].content) or ""
    raise Left(f"no answer by {who}")

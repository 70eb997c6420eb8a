"""K responses to each prompt, drawn at several temperatures and after several system prompts; those that say nothing
new are left out and drawn again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from po.data.read import Record
from po.data.report import Problem
from po.data.rows import Row
from po.prep.asking import said, seeded
from po.prep.chat import TEXT, Answer, Ask, Dialogue, Reply
from po.prep.pairing import lot, number_of
from po.prep.rows import PROMPTS, UNSCORED, ScoredSet, read_set, text_of
from po.prep.sample_distinct import Distinct
from po.prep.sample_rows import Drawn, Encoding, Messages, make_row, with_system
from po.prep.step import Outcome
from po.spec import Source


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How responses are drawn and which of them stay. systems: "" is the prompt as it is."""

    k: int
    temperatures: tuple[float, ...] = (1.0,)
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    systems: tuple[str, ...] = ("",)
    system_by: Literal["cycle", "lot"] = "cycle"
    system_in_prompt: bool = False  # a row for each system prompt, which is part of its prompt
    seed: int = 0
    near: float = 0.8  # Jaccard similarity of word triples from which a response is nearly the same as another
    duplicates: Literal["drop", "keep"] = "drop"
    refill: int = 0  # draws beyond the first k
    least: int = 2  # responses of a row
    truncated: Literal["keep", "drop"] = "keep"
    add: bool = False  # to the responses that the row has
    chat: bool = False  # a prompt that is text becomes a user's message
    logps: bool = True

    def way(self, j: int, *row: str) -> tuple[str, float]:
        """System prompt and temperature of draw j. By cycle all pairs of them come up in turn."""
        S, T = len(self.systems), len(self.temperatures)
        s = j + j // math.lcm(S, T) if self.system_by == "cycle" else number_of(lot(self.seed, "system", *row, str(j)))
        return self.systems[s % S], self.temperatures[j % T]


@dataclass(frozen=True)
class Sample:
    """The strategy of sample.py. model: its name, for `source`. encoding: how a model that runs here sees prompts."""

    source: Source
    draws: Draws
    model: str
    encoding: Encoding | None = None

    def __call__(self, record: Record) -> Dialogue:
        """One row's draws."""
        read = self._read(record)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        prompt = self._prompt(read.row)
        if isinstance(prompt, Problem):
            return Outcome(problem=prompt)
        counts: Counter[str] = Counter()
        drawn, failure = yield from self._draw(read, prompt, counts)
        return self._outcome(read, prompt, drawn, failure, counts)

    def _outcome(
        self, read: ScoredSet, prompt: Messages, drawn: list[Drawn], failure: str | None, counts: Counter[str]
    ) -> Outcome:
        d, groups = self.draws, {"": drawn}
        if d.system_in_prompt:
            of_systems = {s: [x for x in drawn if x.system == system] for s, system in enumerate(d.systems)}
            groups = {f"/system-{s}": some for s, some in of_systems.items()}
        own = len(read.answers) if d.add else 0
        fit = {name: some for name, some in groups.items() if some and own + len(some) >= d.least}
        if not fit:
            return Outcome(dropped=failure or f"fewer than {d.least} responses", sums=counts)
        counts["system prompts with too few responses"] += len(groups) - len(fit)
        counts["rows whose own responses moved into `original`"] += bool(read.answers) and not d.add
        rows = []
        for name, some in fit.items():
            row = make_row(read, prompt, some, d.add, self.encoding, d.system_in_prompt)
            rows.append({**row, "id": f"{read.row.id}{name}"})
            counts["responses without token ids"] += sum("token_ids" not in r for r in row["responses"])
        counts["responses without log-probs"] = sum(x.reply.logprobs is None for some in fit.values() for x in some)
        return Outcome(tuple(rows), sums={k: n for k, n in counts.items() if n})

    def _read(self, record: Record) -> ScoredSet | tuple[Problem, ...]:
        read = read_set(record, self.source, PROMPTS)
        if self.draws.add and isinstance(read, ScoredSet) and read.answers:
            return read_set(record, self.source, UNSCORED)
        return read

    def _prompt(self, row: Row) -> Messages | Problem:
        """The prompt as it is asked."""
        if not isinstance(row.prompt, str):
            return tuple(row.prompt)
        if self.draws.chat:
            return ({"role": "user", "content": row.prompt},)
        if any(self.draws.systems):
            want = "messages, for a system prompt (or --chat, which makes text a user's message)"
            return Problem(row.where, "prompt", want, "text")
        return ({"role": TEXT, "content": row.prompt},)

    def _draw(
        self, read: ScoredSet, prompt: Messages, counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], tuple[list[Drawn], str | None]]:
        """What stays of k draws and of as many more as are missing and allowed; and why, where nothing came."""
        d, distinct = self.draws, Distinct(self.draws.near)
        for content in (r.content for r in read.row.responses if d.add):
            distinct.add(said(content) or text_of(content))
        drawn: list[Drawn] = []
        made, failure = 0, None
        while (now := min(d.k - len(drawn), d.k + d.refill - made)) > 0:
            if made:
                counts["responses asked for again"] += now
            asks = self._asks(read.row, prompt, range(made, made + now))
            answers = yield [ask for _, ask in asks]
            made += now
            for (system, ask), answer in zip(asks, answers, strict=True):
                if answer.problem is not None:
                    failure = f"no answer: {_kind(answer.problem)}"
                    counts[f"responses not given: {_kind(answer.problem)}"] += ask.n
                for reply in answer.replies:
                    why = self._refused(reply, distinct)
                    counts["responses kept" if why is None else f"responses left out: {why}"] += 1
                    if why is None:
                        drawn.append(Drawn(reply, self.model, ask.temperature, system))
        return drawn, None if drawn else failure

    def _asks(self, row: Row, prompt: Messages, draws: Iterable[int]) -> list[tuple[str, Ask]]:
        """A request for each way in which these draws are made, beside its system prompt."""
        d, about = self.draws, (row.id, str(prompt))
        ways: dict[tuple[str, float], list[int]] = {}
        for j in draws:
            ways.setdefault(d.way(j, *about), []).append(j)
        all_alike: dict[str, Any] = {"tools": row.tools or (), "template_kwargs": row.template_kwargs}
        all_alike |= {"top_p": d.top_p, "max_tokens": d.max_tokens, "stop": d.stop, "logprobs": d.logps}
        asks = []
        for (system, temperature), js in ways.items():
            seed = seeded(d.seed, "sample", *about, system, repr(temperature), str(js[0]))
            how: dict[str, Any] = {"n": len(js), "temperature": temperature, "seed": seed, **all_alike}
            asks.append((system, Ask(messages=with_system(prompt, system), **how)))
        return asks

    def _refused(self, reply: Reply, distinct: Distinct) -> str | None:
        """Why a reply does not stay; None where it does."""
        if not reply.text.strip():
            return "empty"
        if reply.finish_reason == "length" and self.draws.truncated == "drop":
            return "cut at --max-tokens"
        return distinct.add(reply.text) if self.draws.duplicates == "drop" else None


def _kind(problem: str) -> str:
    """A server's own words without numbers, which would make every row's failure another."""
    status = re.match(r"HTTP \d+: ", problem)
    return status.group() + re.sub(r"\d+", "#", problem[status.end() :])[:100] if status else problem


def options(draws: Draws) -> Mapping[str, Any]:
    """What decides the bytes, for run_step."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(draws).items()}

"""The pass over all rows: convert, tokenize in chunks (in other processes where asked), count what becomes of each."""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from po.data.extras import Alike
from po.data.facts import NO_ORDER
from po.data.formats import convert
from po.data.overlong import Limits, Outcome, settle
from po.data.report import DataReport, Problem, Say, Tally, describe
from po.data.rows import Example, Row
from po.data.sources import Opened
from po.data.tokenize import Encoder
from po.data.wanted import NOTHING_MORE, Wanted
from po.errors import UserError

_CHUNK = 64  # rows per task of a worker process
_STOPS = 0.95  # share of responses that should end with a stop token


@dataclass
class Build:
    """One pass over the sources. Consume `examples()` to its end, then ask for `report()`."""

    opened: Sequence[Opened]
    encode: Encoder
    limits: Limits
    num_proc: int
    split: str
    wanted: Wanted = NOTHING_MORE
    tally: Tally = field(default_factory=Tally)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    gaps: list[float] = field(default_factory=list)  # score of chosen - score of rejected
    samples: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def examples(self) -> Iterator[Example]:
        """The Examples of all rows that can be trained on, in order."""
        for outcome in settle_all(self._rows(), self.encode, self.limits, self.num_proc):
            self.tally.counts[outcome.fate] += 1
            self.tally.counts.update(outcome.counts)
            for name, line in outcome.lines.items():
                self.tally.keep(name, line)
            if outcome.problem is not None:
                self.tally.counts["bad"] -= 1  # counted by bad()
                self.tally.bad([outcome.problem])
            else:
                self.lengths.append(outcome.length)
            if outcome.example is not None:
                yield outcome.example

    def _rows(self) -> Iterator[Row]:
        first: dict[str, str] = {}
        alike = Alike()
        for one in self.opened:
            for record in one.records():
                self.tally.counts["in"] += 1
                done = convert(record, one.source, self.wanted)
                row, problems = done.row, list(done.problems)
                if row is not None and first.setdefault(row.id, row.where) != row.where:
                    found = f"{describe(row.id)}, which {first[row.id]} has too"
                    problems.append(Problem(row.where, "id", "an id that no other row has", Say(found)))
                problems += alike.problems(row) if row is not None else []
                self.tally.formats[done.format] += 1
                self.unused.update(done.unused)
                if row is None or problems:
                    self.tally.bad(problems)
                    self.tally.counts["unordered"] += any(p.expected == NO_ORDER for p in problems)
                else:
                    self._look(row)
                    yield row

    def _look(self, row: Row) -> None:
        """What only the row itself shows: the direction of its scores, its kind of text."""
        self.tally.counts["text" if isinstance(row.prompt, str) else "conversations"] += 1
        if isinstance(row.prompt, str) and not row.prompt.startswith(self.encode.tokenizer.bos_token or ""):
            self.tally.counts["text_without_bos"] += 1
        scores = [r.reward for r in row.responses if r.reward is not None]
        best, worst = 0, len(row.responses) - 1
        if len(scores) == len(row.responses) > 1 and not row.chosen_first:
            best, worst = scores.index(max(scores)), scores.index(min(scores))
        elif len(scores) == len(row.responses) > 1:
            self.gaps.append(scores[0] - scores[1])
            if scores[0] < scores[1]:
                self.tally.counts["gap"] += 1
                self.tally.keep("gap", f"{row.where}: chosen {scores[0]:g}, rejected {scores[1]:g}")
        if len(row.responses) > 1 and best != worst and len(self.samples) < 3 and row.kind != "unpaired":
            texts = [_excerpt(row.responses[k].content) for k in (best, worst)]
            self.samples.append(f"{row.where}: prefers {texts[0]} over {texts[1]}")

    def report(self) -> DataReport:
        """The report of a finished pass."""
        t = self.tally
        for name in ("in", "kept", "bad", "overlong", "identical", "empty", "problems"):
            t.counts.setdefault(name, 0)
        listings = {name: tuple(lines) for name, lines in t.listings.items()}
        common = dict(t.formats.most_common())
        return DataReport(
            self.split,
            dict(t.counts),
            common,
            listings,
            _quantiles(self.lengths),
            tuple(self._refusals()),
            tuple(self._warnings()),
            tuple(self.samples),
        )

    def _refusals(self) -> Iterator[str]:
        if self.tally.counts["unordered"]:
            yield (
                f"{self.tally.counts['unordered']} rows have ranks, and the recipe does not say which end is better. "
                "Add rank_order: lower_is_better (1 is the best) or rank_order: higher_is_better to the source"
            )
        if self.gaps and sum(self.gaps) < 0:
            yield (
                f"the chosen responses score lower than the rejected ones: {sum(self.gaps) / len(self.gaps):.4g} on "
                f"average over {len(self.gaps)} pairs. Are the columns or the scores' direction swapped?"
            )

    def _warnings(self) -> Iterator[str]:
        c, tokenizer = self.tally.counts, self.encode.tokenizer
        ending = c["responses_kept"] - c["responses_open"]
        if ending and c["responses_stop"] / ending < _STOPS:
            share = c["responses_stop"] / ending
            yield f"only {share:.1%} of the responses end with a stop token; the model may not learn to stop"
        if c["responses_eos_added"]:
            eos = tokenizer.eos_token
            yield f"the chat template ends {c['responses_eos_added']} responses without a stop token; {eos!r} was added"
        if c["text"] and c["conversations"]:
            yield f"{c['text']} rows are plain text and {c['conversations']} are conversations"
        if c["text"] and tokenizer.chat_template:
            yield f"{c['text']} rows are plain text: the tokenizer's chat template is not applied to them"
        if (n := c["text_without_bos"]) and tokenizer.bos_token_id not in self.encode.lead:
            bos = tokenizer.bos_token
            yield f"{n} prompts do not begin with {bos!r}, and the tokenizer adds none: write it if the model wants it"
        if self.unused:
            yield "columns that nothing reads: " + ", ".join(name for name, _ in self.unused.most_common(20))
        for option, mark in (("separator", "split at the separator"), ("rank_order", "ranks")):
            given = any(getattr(one.source, option) is not None for one in self.opened)
            if given and not any(mark in name.split(", ") for name in self.tally.formats):
                yield f"{option} was given, but no row needed it"


def settle_all(rows: Iterable[Row], encode: Encoder, limits: Limits, num_proc: int) -> Iterator[Outcome]:
    """Outcomes in the order of the rows, made by num_proc processes; only a window of rows is in memory."""
    if num_proc < 1:
        raise UserError(f"data.num_proc: expected at least 1 process, got {num_proc}")
    if num_proc == 1:
        yield from (settle(row, encode, limits) for row in rows)
        return
    source, waiting = iter(rows), deque[Future[list[Outcome]]]()
    fork = multiprocessing.get_context("fork")  # the workers inherit the tokenizer; nothing of the caller is run again
    with ProcessPoolExecutor(num_proc, fork, _start_worker, (encode, limits)) as pool:
        while (chunk := list(islice(source, _CHUNK))) or waiting:
            if chunk:
                waiting.append(pool.submit(_settle_chunk, chunk))
            if len(waiting) >= 4 * num_proc or not chunk:
                yield from waiting.popleft().result()


_WORKER: list[tuple[Encoder, Limits]] = []  # of this process, where it is a worker


def _start_worker(encode: Encoder, limits: Limits) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER[:] = [(encode, limits)]


def _settle_chunk(rows: list[Row]) -> list[Outcome]:
    encode, limits = _WORKER[0]
    return [settle(row, encode, limits) for row in rows]


def _quantiles(lengths: array[int]) -> dict[str, int]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    at = {f"{q} %": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (50, 90, 99)}
    return {**at, "longest": ordered[-1]}


def _excerpt(content: object) -> str:
    if not isinstance(content, str):
        content = " ".join(str(m.get("content", "")) for m in content)  # type: ignore[attr-defined]
    return describe(content.strip())

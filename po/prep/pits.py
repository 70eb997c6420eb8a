"""The value of each step of a wrong solution, and a pair at its first pit: where the chance of success is lost.

Setlur et al. 2024, RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning, arXiv:2406.14532.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
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
    settled,
    switched,
    without_tokens,
    written,
)
from po.prep.chat import TEXT, Answer, Ask
from po.prep.contrast import Sampling
from po.prep.prompts import Prompt
from po.prep.rows import ScoredSet
from po.prep.search_prompts import CONTINUE
from po.prep.step import Outcome
from po.rewards.group import first_pit, step_advantages
from po.spec import Source

Value = Literal["best_of", "mean"]
# Prompt, solutions, the row's columns -> 1 or 0 for each solution; None: the verifier failed.
Verify = Callable[[Any, Sequence[str], Mapping[str, Any]], list[float | None]]


def split_steps(text: str, separator: str) -> list[str]:
    """The steps with what separates them, so that they join to the text; blank ones belong to the step before."""
    pieces = text.split(separator)
    whole = [p + separator for p in pieces[:-1]] + pieces[-1:]
    steps: list[str] = []
    for piece in whole:
        if steps and (not piece.strip() or not steps[-1].strip()):
            steps[-1] += piece
        else:
            steps.append(piece)
    return steps


def value(rights: Sequence[bool], best_of: int) -> float:
    """Q by samples: 1 - (1 - p)^K, the chance that the best of K is right; K = 1 is p itself."""
    p = sum(rights) / len(rights)
    return float(1 - (1 - p) ** best_of)


@dataclass(frozen=True)
class Tried:
    """What was sampled after one beginning: of the solutions that could be verified which are right.

    texts: theirs; of one that was cut None.
    """

    texts: tuple[str | None, ...]
    rights: tuple[bool, ...]

    @property
    def right(self) -> str | None:
        """The first right solution that is whole."""
        return next((t for t, right in zip(self.texts, self.rights, strict=True) if right and t is not None), None)


@dataclass(frozen=True)
class Steps:
    """The work of one row: a problem with solutions, some of them wrong, and what the verifier reads.

    best_of: K of the policy whose success is the value; 1: the model's own. as_text: continue plain text as it is;
    otherwise, and for conversations, the prompt asks to go on.
    """

    source: Source
    model: str
    verify: Verify
    columns: tuple[str, ...] = ("answer",)  # that the verifier reads
    samples: int = 5
    best_of: int = 5
    separator: str = "\n"
    per_prompt: int = 8
    plain_text: bool = False
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    go_on: Prompt = CONTINUE

    def __call__(self, record: Record) -> Rounds:
        """One round of requests, and at its end the Outcome."""
        read = read_answers(record, self.source)
        if isinstance(read, tuple):
            return Outcome(problem=read)
        for name in self.columns:
            if read.fields.get(name) is None:
                got = describe(read.fields.get(name, NOTHING))
                return Outcome(problem=Problem(record.where, name, "what the verifier compares with", got))
        return (yield from settled(read, self._rows))

    def _rows(self, read: ScoredSet, counts: Counter[str]) -> Generator[list[Ask], list[Answer], list[dict[str, Any]]]:
        wrong, solutions = self._told_apart(read, counts)
        steps = {k: split_steps(text, self.separator) for k, text in wrong.items()}
        begun = [*dict.fromkeys(["", *("".join(s[:i]) for s in steps.values() for i in range(1, len(s)))])]
        tried = dict(zip(begun, (yield from self._tried(read, begun, counts)), strict=True))
        start = value(tried[""].rights, self.best_of)
        rows = []
        for k, one in steps.items():
            before = ["".join(one[:i]) for i in range(len(one))]
            values = [*(value(tried[b].rights, self.best_of) for b in before[1:]), 0.0]  # it ends wrong
            counts["steps"] += len(values)
            pit = first_pit(values)
            good = self._right(read, tried[before[pit]])
            counts["pairs with a right continuation"] += good is not None
            good = good or next(iter(solutions), None) or self._right(read, tried[""])
            if good is None:
                counts["wrong solutions left: no right one to prefer"] += 1
                continue
            counts["pairs of prompts with a value of 0"] += start == 0
            rows.append(self._row(read, k, one, start, values, pit, good))
        if not rows:
            raise Left("no right solution, nor a right continuation")
        return rows

    def _right(self, read: ScoredSet, tried: Tried) -> dict[str, Any] | None:
        if tried.right is None:
            return None
        return {"content": written(read.row, tried.right), "source": self.model, "reward": 1.0}

    def _told_apart(self, read: ScoredSet, counts: Counter[str]) -> tuple[dict[int, str], list[dict[str, Any]]]:
        """The wrong solutions by place, as many as are wanted, and the right ones as answers."""
        texts = {k: t for k, a in enumerate(read.answers) if (t := said(a["content"])) is not None and t.strip()}
        verified = self._verified(read, list(texts.values()))
        counts["solutions that could not be verified"] += verified.count(None)
        wrong = {k: t for (k, t), v in zip(texts.items(), verified, strict=True) if v is not None and v <= 0}
        fine = [k for k, v in zip(texts, verified, strict=True) if v is not None and v > 0]
        if not wrong:
            raise Left("no wrong solution")
        counts["wrong solutions beyond --per-prompt"] += max(0, len(wrong) - self.per_prompt)
        right = [plain(read.answers[k], reward=1.0) for k in fine if read.row.responses[k].ended]
        return dict(list(wrong.items())[: self.per_prompt]), right

    def _tried(
        self, read: ScoredSet, begun: Sequence[str], counts: Counter[str]
    ) -> Generator[list[Ask], list[Answer], list[Tried]]:
        answers = yield from complete([self._ask(read, b) for b in begun])
        out = []
        for b, answer in zip(begun, answers, strict=True):
            texts = [b + r.text.removeprefix(b) for r in answer.replies]
            found = self._verified(read, texts)
            cut = [r.finish_reason == "length" for r in answer.replies]
            counts["solutions sampled"] += len(texts)
            counts["solutions sampled that were cut"] += sum(cut)
            counts["solutions that could not be verified"] += found.count(None)
            known = [(None if c else t, v > 0) for t, v, c in zip(texts, found, cut, strict=True) if v is not None]
            if not known:
                raise Left("no sampled solution could be verified")
            out.append(Tried(tuple(t for t, _ in known), tuple(right for _, right in known)))
        return out

    def _verified(self, read: ScoredSet, texts: Sequence[str]) -> list[float | None]:
        return self.verify(read.row.prompt, texts, read.fields) if texts else []

    def _ask(self, read: ScoredSet, prefix: str) -> Ask:
        if self.plain_text and isinstance(read.row.prompt, str):
            messages: Any = ({"role": TEXT, "content": read.row.prompt + prefix},)
        elif prefix:
            messages = say(self.go_on.fill(task=as_text(read.row), prefix=prefix))
        else:
            messages = conversation(read.row)
        return switched(read.row, self.sampling.ask(messages, n=self.samples))

    def _row(
        self,
        read: ScoredSet,
        k: int,
        steps: Sequence[str],
        start: float,
        values: Sequence[float],
        pit: int,
        good: Mapping[str, Any],
    ) -> dict[str, Any]:
        """A set of two: a pair cannot say that its rejected side was cut."""
        last = pit == len(steps) - 1
        worse = plain(read.answers[k], content=written(read.row, "".join(steps[: pit + 1])), reward=0.0)
        if not (last and read.row.responses[k].ended):
            worse["ended"] = False
        how: dict[str, Any] = {"strategy": "steps", "prompts": [self.go_on.said], "values": [start, *values]}
        how |= {"advantages": step_advantages(start, values), "pit": pit + 1}
        fields = without_tokens(read.fields)
        return {**fields, "id": f"{read.row.id}/{k}-pit", "contrast": how, "responses": [dict(good), worse]}

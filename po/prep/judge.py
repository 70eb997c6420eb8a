"""A language model as a judge: a score of one answer, or a choice between two that is asked for in both orders.

What a judge says is read strictly: a verdict that does not stand on the last line, in the form that was asked for and
only once, is none. It is asked for again with another seed; what is still missing then is missing, and never a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, TypeVar

from po.prep.asking import Left, as_text, say, seeded
from po.prep.chat import Answer, Ask, Chat, Dialogue, together
from po.prep.judge_spec import JudgeSpec
from po.prep.prompts import Prompt
from po.prep.rows import ScoredSet
from po.prep.step import Outcome
from po.prep.verdicts import form, last_line
from po.rewards.cells import text_of

T = TypeVar("T")
Verdict = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Lacking:
    """Why an answer has no score from a scorer."""

    kind: str  # to count by
    text: str = ""


Cell = float | Lacking | None  # None: the scorer does not apply to the answer
Rounds = Generator[list[Ask], list[Answer], T]

_SCORE, _VERDICT = form("score", r"([-+]?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?"), form("verdict", "(a|b|tie)")


def read_score(text: str, scale: tuple[float, float]) -> float | Lacking:
    """The number of a last line `Score: 7` or `Score: 7/10`."""
    found = last_line(_SCORE, text)
    if isinstance(found, str):
        return Lacking(found, _end(text))
    score = float(found[1])
    if not scale[0] <= score <= scale[1] or (found[2] is not None and float(found[2]) != scale[1]):
        return Lacking("outside the scale", _end(text))
    return score


def read_verdict(text: str) -> Verdict | Lacking:
    """What a last line `Verdict: A` says."""
    found = last_line(_VERDICT, text)
    return Lacking(found, _end(text)) if isinstance(found, str) else found[1].lower()  # type: ignore[return-value]


def _end(text: str) -> str:
    return repr(text if len(text) <= 120 else f"...{text[-117:]}")


@dataclass(frozen=True)
class Judge:
    """A judge that is ready: `judged` has it judge rows."""

    name: str
    spec: JudgeSpec
    chat: Chat
    prompt: Prompt

    @property
    def said(self) -> dict[str, Any]:
        """What rows and reports say of it."""
        return {"kind": self.spec.judge, "model": self.chat.name, "prompt": self.prompt.said}

    def rounds(self, read: ScoredSet, best: int | None, counts: Counter[str]) -> Rounds[list[Cell]]:
        """What to ask about a row, and at last a cell for each of its answers. best: with best_vs_rest."""
        try:
            task = as_text(read.row)
        except Left as e:
            return [Lacking("cannot be shown to a judge", str(e))] * len(read.answers)
        texts = [text_of(r.content) for r in read.row.responses]
        if self.spec.judge == "pointwise":
            asks = [self._ask(task, response=text) for text in texts]
            return list((yield from self._until_read(asks, lambda t: read_score(t, self.spec.scale), counts)))
        n = len(texts)
        contests = list(combinations(range(n), 2)) if best is None else [(best, k) for k in range(n) if k != best]
        decided = yield from self._contests(task, texts, contests, counts)
        return win_shares(n, dict(zip(contests, decided, strict=True)))

    def _contests(
        self, task: str, texts: Sequence[str], contests: Sequence[tuple[int, int]], counts: Counter[str]
    ) -> Rounds[list[float | Lacking]]:
        """1, 1/2 or 0 for the first of each two. Equal texts are a tie that nobody need be asked about."""
        shown = [(i, j) for a, b in contests if texts[a] != texts[b] for i, j in ((a, b), (b, a))]
        asks = [self._ask(task, response_a=texts[i], response_b=texts[j]) for i, j in shown]
        found = dict(zip(shown, (yield from self._until_read(asks, read_verdict, counts)), strict=True))
        out: list[float | Lacking] = []
        for a, b in contests:
            one, other = found.get((a, b), "tie"), found.get((b, a), "tie")
            lacking = next((v for v in (one, other) if isinstance(v, Lacking)), None)
            out.append(lacking or decide(one, other, counts))  # type: ignore[arg-type]
        return out

    def _ask(self, task: str, **texts: str) -> Ask:
        s = self.spec
        said = self.prompt.fill(prompt=task, **texts)
        return Ask(messages=say(said), temperature=s.temperature, max_tokens=s.max_tokens, seed=seeded(s.seed, said))

    def _until_read(
        self, asks: Sequence[Ask], read: Callable[[str], T | Lacking], counts: Counter[str]
    ) -> Rounds[list[T | Lacking]]:
        """A verdict for each request, those that could not be read asked for again."""
        found: dict[int, T | Lacking] = {}
        open_, retries = list(range(len(asks))), self.spec.retries_unparsed
        for attempt in range(retries + 1):
            answers = (yield [self._again(asks[i], attempt) for i in open_]) if open_ else []
            for i, answer in zip(open_, answers, strict=True):
                found[i] = _verdict(answer, read)
            open_ = [i for i in open_ if isinstance(one := found[i], Lacking) and one.kind != "no answer"]
            counts["verdicts asked for again"] += len(open_) if attempt < retries else 0
        counts["verdicts"] += len(asks)
        counts.update(f"verdicts missing: {v.kind}" for v in found.values() if isinstance(v, Lacking))
        return [found[i] for i in range(len(asks))]

    def _again(self, ask: Ask, attempt: int) -> Ask:
        if attempt == 0:
            return ask
        hotter = max(ask.temperature, self.spec.retry_temperature)
        return replace(ask, seed=(ask.seed or 0) + attempt, temperature=hotter)


def _verdict(answer: Answer, read: Callable[[str], T | Lacking]) -> T | Lacking:
    if answer.problem is not None or not answer.replies:
        return Lacking("no answer", answer.problem or "no reply")
    reply = answer.replies[0]
    found = read(reply.text)
    if isinstance(found, Lacking) and reply.finish_reason == "length":
        return Lacking("cut off at max_tokens", found.text)
    return found


def decide(first: Verdict, second: Verdict, counts: Counter[str]) -> float:
    """What the first of two answers gets: 1, 1/2 or 0. first: the verdict with it shown as A; second: as B.

    Verdicts that do not agree are a tie, counted as what they are.
    """
    one = {"a": 1.0, "tie": 0.5, "b": 0.0}
    a, b = one[first], 1 - one[second]
    counts["comparisons"] += 1
    if a != b:
        counts["comparisons that depend on the order"] += 1
        if first == second:
            counts[f"comparisons won by the {'first' if first == 'a' else 'second'} shown both times"] += 1
        return 0.5
    counts["ties in both orders"] += a == 0.5
    return a


def win_shares(n: int, decided: Mapping[tuple[int, int], float | Lacking]) -> list[Cell]:
    """decided[i, j]: what i got against j -> the mean of what each of n answers got in all its comparisons.

    Where comparisons are missing, the answer that lacks the largest share of its own (the last among equals) has no
    score and its comparisons go, until none is missing: so shares are of the same opponents. An answer that no other is
    left for has no score; one that was never compared was not judged: None.
    """
    left, out = dict(decided), dict[int, Lacking]()
    while any(isinstance(v, Lacking) for v in left.values()):
        of = [[v for pair, v in left.items() if k in pair] for k in range(n)]
        lacks = [sum(isinstance(v, Lacking) for v in vs) / len(vs) if vs else 0.0 for vs in of]
        worst = max(range(n), key=lambda k: (lacks[k], k))
        out[worst] = next(v for v in of[worst] if isinstance(v, Lacking))
        left = {pair: v for pair, v in left.items() if worst not in pair}
    cells: list[Cell] = []
    for k in range(n):
        got = [v if i == k else 1 - v for (i, j), v in left.items() if k in (i, j) and not isinstance(v, Lacking)]
        gone = next((out[j] for pair in decided if k in pair for j in pair if j in out), None)
        cells.append(out[k] if k in out else sum(got) / len(got) if got else gone)
    return cells


def judged(
    judge: Judge, rows: Sequence[ScoredSet], best: Sequence[int | None]
) -> list[tuple[list[Cell], dict[str, float]]]:
    """All rows at once: the cells of each, and what was counted."""
    cells: dict[int, list[Cell]] = {}

    def row(i: int) -> Dialogue:
        counts = Counter[str]()
        cells[i] = yield from judge.rounds(rows[i], best[i], counts)
        return Outcome(sums={f"{judge.name}: {what}": n for what, n in counts.items() if n})

    outcomes = together(judge.chat, [row(i) for i in range(len(rows))], [r.row.where for r in rows])
    return [(cells[i], dict(o.sums)) for i, o in enumerate(outcomes)]

"""What a check wants to know of one row, in little: hashes, lengths, scores. Done in worker processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from po.data.formats import convert
from po.data.overlong import Limits, settle
from po.data.read import Record
from po.data.report import Problem
from po.data.rows import Row
from po.data.tokenize import Coded, Encoder
from po.prep.near import jaccard, shingles, signature
from po.prep.rows import WANTED
from po.prep.texts import Tests, asked_of, hashed, normal, text_of
from po.spec import Source

_ALL_PAIRS = 8  # responses up to which all pairs of a set are compared with other rows
NEARLY = 0.9  # shared triples of words from which two responses are nearly identical
_SHORT, _LONG = 20, 200  # characters below which a language is not guessed, and from which no more are looked at
_EVERY = 20_000  # rows of a file whose language is guessed; of those behind them one in ten, by its content


@dataclass
class Measured:
    """Of one row; `problems` alone where it is bad."""

    problems: Sequence[Problem] = ()
    row_id: int = 0
    prompt: int = 0
    content: int = 0  # prompt and responses, and of two which is better
    kind: str = ""
    claims: list[int] = field(default_factory=list)  # hashes of comparisons and labels; the last bit is which way
    signature: bytes = b""
    likeness: float = 0.0  # of the two responses that are compared
    language: str = ""
    lengths: tuple[int, int, int] | None = None  # characters: prompt, better, worse
    prompt_length: int = 0
    margin: float | None = None
    scores: list[tuple[str, float, int]] = field(default_factory=list)  # source, reward, characters
    overlap: tuple[str, str, float] | None = None  # an n-gram, where in the test sets, share of the prompt in n-grams
    leak: str = ""  # where in the test sets the same prompt is
    tokens: dict[str, int] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)


class _Remembering(Encoder):
    """Keeps what it last made, to compare with what a policy left of it."""

    last: Coded

    def __call__(self, row: Row) -> Coded:
        self.last = super().__call__(row)
        return self.last


class Measure:
    """The work on one record."""

    def __init__(
        self,
        source: Source,
        tests: Tests,
        *,
        near: bool = True,
        language: bool = True,
        tokenizer: Any = None,
        limits: Limits | None = None,
    ) -> None:
        self.source, self.tests, self.near, self.limits = source, tests, near, limits
        self.encode = None if tokenizer is None else _Remembering(tokenizer)
        self.classify = _classifier() if language else None

    def __call__(self, record: Record) -> Measured:
        """All that is asked for, in one go."""
        done = convert(record, self.source, WANTED)
        row = done.row
        if row is None:
            return Measured(problems=done.problems)
        prompt, texts = text_of(row.prompt), [text_of(r.content) for r in row.responses]
        asked = asked_of(row)
        plain = normal(prompt)
        m = Measured(row_id=hashed(row.id), prompt=hashed(plain), kind=_kind(row), prompt_length=len(prompt))
        normals = [normal(t) for t in texts]
        m.claims = _claims(row, plain, normals)
        best, worst = _ends(row)
        m.content = hashed(plain, *_said(row, normals, best, worst))
        pieces = [shingles(t) for t in (texts if self.near else [texts[k] for k in {best, worst} if k >= 0])]
        if best != worst:
            sides = (pieces[best], pieces[worst]) if self.near else tuple(pieces)
            m.likeness = 1.0 if normals[best] == normals[worst] else jaccard(*sides)
            m.lengths = (len(prompt), len(texts[best]), len(texts[worst]))
            m.margin = _margin(row, best, worst)
        if self.near:
            m.signature = signature(set().union(shingles(prompt), *pieces))
        if self.classify is not None and texts and (_line(record.where) <= _EVERY or m.content % 10 == 0):
            m.language = self.classify(texts[max(best, 0)])
        m.scores = [
            (_source(row, k), r.reward, len(texts[k])) for k, r in enumerate(row.responses) if r.reward is not None
        ]
        m.leak = self.tests.prompts.get(hashed(normal(asked)), "") if self.tests.prompts else ""
        m.overlap = self.tests.overlap(asked) if self.tests.grams else None
        if self.encode is not None:
            self._tokens(row, m)
        return m

    def _tokens(self, row: Row, m: Measured) -> None:
        """What becomes of the row's tokens: where prompt and response meet, how responses end, what is cut."""
        assert self.encode is not None
        assert self.limits is not None
        out = settle(row, self.encode, self.limits)
        if out.problem is not None:
            m.problems = [out.problem]
            return
        coded = self.encode.last
        before = len(coded.prompt_ids) + sum(map(len, coded.response_ids))
        example = out.example
        after = 0 if example is None else len(example.prompt_ids) + sum(map(len, example.response_ids))
        m.tokens = {"tokens": before, "tokens_lost": before - after, f"rows_{out.fate}": 1, "longest": out.length}
        m.tokens["rows_cut"] = int("cut" in out.counts)
        m.lines = dict(out.lines)
        m.tokens["rows_boundary"] = int(bool(coded.merged))
        special = self.encode.tokenizer.bos_token_id
        for ids in () if example is None else example.response_ids:
            m.tokens["responses"] = m.tokens.get("responses", 0) + 1
            stops = self.encode.stops_at_end(ids)
            m.tokens["responses_without_end"] = m.tokens.get("responses_without_end", 0) + (not stops)
            inside = self.encode.eos in ids[:-1] and not isinstance(row.prompt, tuple)
            m.tokens["eos_inside"] = m.tokens.get("eos_inside", 0) + inside
        if example is not None and special is not None and special != self.encode.eos:
            whole = [*example.prompt_ids, *(i for ids in example.response_ids for i in ids)]
            m.tokens["bos_twice"] = int(whole.count(special) > 1)
            m.tokens["bos_missing"] = int(special not in whole and special in self.encode.lead)


def _classifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def classify(text: str) -> str:
        """The language's code; '?' for a short text, or where the model is less than 80 % sure."""
        text = text.strip()[:_LONG]
        if len(text) < _SHORT:
            return "?"
        code, probability = identifier.classify(text)
        return str(code) if probability >= 0.8 else "?"

    return classify


def _line(where: str) -> int:
    return int(where.rpartition(":")[2].removeprefix("row "))


def _kind(row: Row) -> str:
    return "pair" if row.chosen_first else "labelled" if row.kind == "unpaired" else row.kind


def _said(row: Row, texts: Sequence[str], best: int, worst: int) -> list[str]:
    """What makes rows of one prompt the same: of two responses the better one first, else all in any order."""
    if len(texts) == 2 and best != worst:
        return [texts[best], texts[worst]]
    return sorted(f"{r.label} {text}" for r, text in zip(row.responses, texts))


def _ends(row: Row) -> tuple[int, int]:
    """The best and the worst response, the first of equal ones; the same twice where there is no preference."""
    if row.chosen_first:
        return 0, 1
    scores = [r.reward if r.reward is not None else r.label for r in row.responses]
    if not scores or any(s is None for s in scores):
        return 0, 0
    known = [s for s in scores if s is not None]
    best, worst = known.index(max(known)), known.index(min(known))
    return (best, worst) if known[best] > known[worst] else (best, best)


def _margin(row: Row, best: int, worst: int) -> float | None:
    a, b = row.responses[best].reward, row.responses[worst].reward
    return None if a is None or b is None else a - b


def _claims(row: Row, prompt: str, texts: Sequence[str]) -> list[int]:
    """Which response is better than which, and which is good: two rows that claim opposite things differ in a bit."""
    claims = []
    scores: Mapping[int, float] = (
        {0: 1.0, 1: 0.0}
        if row.chosen_first
        else {k: r.reward for k, r in enumerate(row.responses) if r.reward is not None}
    )
    if len(scores) > 1:
        few = len(scores) <= _ALL_PAIRS
        top = max(scores, key=lambda k: scores[k])
        for a, b in combinations(scores, 2):
            if (few or top in (a, b)) and scores[a] != scores[b] and texts[a] != texts[b]:
                low, high = sorted((a, b), key=lambda k: texts[k])
                claims.append(hashed("pair", prompt, texts[low], texts[high]) & ~1 | (scores[low] > scores[high]))
    for r, text in zip(row.responses, texts):
        if r.label:
            claims.append(hashed("label", prompt, text) & ~1 | (r.label > 0))
    return claims


def _source(row: Row, k: int) -> str:
    """Who wrote a response, or where the row is from."""
    side = ("chosen_model", "rejected_model")[k] if row.chosen_first and k < 2 else ""
    found = row.responses[k].source or row.meta.get(side) or row.meta.get("source")
    return str(found) if isinstance(found, str | int) else "(no source)"

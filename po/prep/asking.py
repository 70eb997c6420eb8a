"""What strategies that ask a model share: rows as they need them, requests, answers that must have come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

from po.data.formats import CHOSEN, REJECTED, SET
from po.data.read import Record
from po.data.report import Problem
from po.data.rows import Message, Row
from po.prep.chat import Answer, Ask
from po.prep.pairing import lot, number_of
from po.prep.rows import PROMPTS, UNSCORED, ScoredSet, read_set
from po.prep.step import Outcome
from po.spec import Source

Rounds = Generator[list[Ask], list[Answer], Any]
_OF_TOKENS = ("prompt_ids", "tokenizer")  # say nothing of answers that were not sampled with them


class Left(Exception):  # noqa: N818 - no error: why a row gives nothing
    """A row gives nothing, for this reason."""


def settled(read: ScoredSet | tuple[Problem, ...], rounds: Callable[[ScoredSet, Counter[str]], Rounds]) -> Rounds:
    """A row's rounds to their Outcome: rows, or the reason of `Left`, and in both cases what `rounds` counted; what is
    wrong with a row that could not be read."""
    if isinstance(read, tuple):
        return Outcome(problem=read)
    counts: Counter[str] = Counter()
    try:
        rows = yield from rounds(read, counts)
    except Left as e:
        return Outcome(dropped=str(e), sums=counts)
    return Outcome(tuple(rows), sums=counts)


def answered(asks: list[Ask]) -> Generator[list[Ask], list[Answer], list[list[str]]]:
    """The texts that each request got. Left where one got none: what is missing must not count as a verdict."""
    answers = yield from complete(asks)
    return [[reply.text for reply in answer.replies] for answer in answers]


def complete(asks: list[Ask]) -> Generator[list[Ask], list[Answer], list[Answer]]:
    """The answers, none of which is a problem."""
    answers = (yield asks) if asks else []
    for answer in answers:
        if answer.problem is not None:
            raise Left(f"no answer: {answer.problem}")
    return answers


def seeded(seed: int, *texts: str) -> int:
    """A request's seed: by what it is about, so that neither the order nor the number of rows matters."""
    return number_of(lot(seed, *texts)) % 2**31


def say(text: str) -> tuple[Mapping[str, str], ...]:
    """A conversation of one user message."""
    return ({"role": "user", "content": text},)


def conversation(row: Row) -> tuple[Mapping[str, str], ...]:
    """The prompt as messages; Left where it has more than text."""
    if isinstance(row.prompt, str):
        return say(row.prompt)
    return tuple({"role": str(m["role"]), "content": _content(m)} for m in row.prompt)


def switched(row: Row, ask: Ask) -> Ask:
    """The request with the row's tools and switches of the chat template."""
    return replace(ask, tools=row.tools or (), template_kwargs=row.template_kwargs)


def as_text(row: Row) -> str:
    """The prompt as a judge is shown it: what a user asked, or the conversation with who says what."""
    messages = conversation(row)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise Left("a prompt of more than text")
    return content


def said(content: object) -> str | None:
    """An answer that is text, or one message of text; None for others."""
    if isinstance(content, list | tuple) and len(content) == 1 and not content[0].get("tool_calls"):
        content = content[0].get("content")
    return content if isinstance(content, str) else None


def written(row: Row, text: str) -> Any:
    """A text as a response to this prompt."""
    return text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]


def without_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields without what belongs to sampled tokens."""
    return {k: v for k, v in fields.items() if k not in _OF_TOKENS}


def plain(answer: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Of an answer what holds without its tokens: text and who wrote it."""
    return {**{k: v for k, v in answer.items() if k in ("content", "source")}, **more}


def read_answers(record: Record, source: Source) -> ScoredSet | tuple[Problem, ...]:
    """A row whether or not its responses are scored; one without responses is a prompt."""
    data = record.data or {}
    some = any(data.get(source.columns.get(name, name)) for name in (*SET, *CHOSEN, *REJECTED))
    return read_set(record, source, UNSCORED if some else PROMPTS)

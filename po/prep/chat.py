"""Asking a language model: what a request and an answer are, and many rows' conversations with it at once.

A strategy is a generator function over a row. It yields lists of `Ask`, is sent the lists of their `Answer`s, and
returns the row's `Outcome`:

    def shorter(record: Record) -> Dialogue:
        (answer,) = yield [Ask(messages=({"role": "user", "content": record.data["prompt"]},))]
        if answer.problem:
            return Outcome(dropped=f"no answer: {answer.problem}")
        return Outcome(rows=({**record.data, "completion": answer.replies[0].text},))

    run_step(..., batch_work=lambda records: together(chat, [shorter(r) for r in records], [r.where for r in records]))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from po.prep.step import Outcome

TEXT = "text"  # the role of a plain text that is to be continued as it is, in no chat template


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: n answers to a conversation, or to a single message of role `text`, which is continued.

    of: whose request it is ("file:line"). Where two rows ask the same, each gets an answer of its own, also when the
    step goes on after a kill. `together` fills it in.
    """

    messages: tuple[Mapping[str, Any], ...]  # role, content
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it
    top_logprobs: int = 0  # >0: the most likely tokens at each place, with log-probs
    logprobs: bool = False  # log-probs of the sampled tokens
    of: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()  # for the chat template of a model that runs here; no server is given any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs, e.g. enable_thinking


@dataclass(frozen=True)
class Reply:
    """One answer. The last three are there where the backend knows them and they were asked for."""

    text: str
    finish_reason: str | None = None  # "stop", "length" (cut by max_tokens), or what a server says
    logprobs: tuple[float, ...] | None = None  # of its tokens
    top: tuple[Mapping[str, float], ...] | None = None  # for each place: token text -> log-prob
    token_ids: tuple[int, ...] | None = None  # its tokens, its end token included
    prompt_ids: tuple[int, ...] | None = None  # the tokens that it follows


@dataclass(frozen=True)
class Answer:
    """What became of one Ask: n replies, or a named failure after all retries. sums: requests, retries, prompt tokens,
    completion tokens, cost ($)."""

    replies: tuple[Reply, ...] = ()
    problem: str | None = None
    sums: Mapping[str, float] = field(default_factory=dict)


class Chat(Protocol):
    """A model that can be asked."""

    name: str  # the model's, for `source`

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """All at once; answers in the order of asks. Raises UserError where nothing else would work either."""
        ...


Dialogue = Generator[list[Ask], list[Answer], Outcome]


def together(chat: Chat, dialogues: Sequence[Dialogue], of: Sequence[str] = ()) -> list[Outcome]:
    """Run many rows' dialogues, each round's requests as one call; the sums of all answers join their Outcome's.

    of: for each dialogue what Ask.of is to be, the row's place.
    """
    if of and len(of) != len(dialogues):
        raise ValueError(f"{len(of)} places for {len(dialogues)} dialogues")
    outcomes: dict[int, Outcome] = {}
    sums: list[dict[str, float]] = [{} for _ in dialogues]
    waiting: dict[int, list[Answer] | None] = dict.fromkeys(range(len(dialogues)))
    while waiting:
        asked: dict[int, list[Ask]] = {}
        for i, answers in waiting.items():
            try:
                asks = next(dialogues[i]) if answers is None else dialogues[i].send(answers)
                asked[i] = [replace(a, of=of[i]) for a in asks] if of else asks
            except StopIteration as end:
                outcomes[i] = end.value
        answered = iter(chat.ask([a for asks in asked.values() for a in asks]) if any(asked.values()) else [])
        waiting = {i: [next(answered) for _ in asks] for i, asks in asked.items()}
        for i, found in waiting.items():
            for answer in found or ():
                sums[i] = _added(sums[i], answer.sums)
    return [replace(o, sums=_added(o.sums, sums[i])) for i, o in sorted(outcomes.items())]


def _added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


class Numbered:
    """A key for each request: a hash of all that it says, and how often it was made before.

    The same in a step that goes on after a kill, where `Ask.of` names the row.
    """

    def __init__(self, model: str) -> None:
        self._model, self._made = model, Counter[str]()

    def __call__(self, asks: Iterable[Ask]) -> list[str]:
        """The keys, in the order of asks."""
        keys = []
        for ask in asks:
            fields = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask)}
            said = json.dumps([self._model, fields], sort_keys=True, default=dict)
            key = hashlib.sha256(said.encode(errors="backslashreplace")).hexdigest()[:32]
            keys.append(f"{key}.{self._made[key]}")
            self._made[key] += 1
        return keys

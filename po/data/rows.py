"""The one internal row, whether it came from a file, a hub or a sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
Kind = Literal["pair", "set", "unpaired", "demonstration", "prompt"]


@dataclass(frozen=True)
class Teacher:
    """At each token of a response, some token ids and their log-probs under a teacher and under its own reference."""

    ids: tuple[tuple[int, ...], ...]
    logps: tuple[tuple[float, ...], ...]
    ref_logps: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Response:
    """One answer to the prompt: text, or the messages after the prompt when the prompt is a conversation."""

    content: str | tuple[Message, ...]
    reward: float | None = None  # higher is better
    label: int | None = None  # +1 desirable, -1 not, 0 stated to be unlabelled
    logps: tuple[float, ...] | None = None  # the sampler's log-prob of each token
    source: str | None = None  # which model or person wrote it
    embedding: tuple[float, ...] | None = None
    teacher: Teacher | None = None
    token_ids: tuple[int, ...] | None = None  # as they were sampled; only where the row has prompt_ids
    ended: bool = True  # False: cut at a limit of length, so that no end token follows
    columns: Mapping[str, float] = field(default_factory=dict)  # numbers that a head declares, by name
    token_columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # and lists of one per token


@dataclass(frozen=True)
class Row:
    """A prompt and its responses. A pair is two responses, best first; a set has a reward on each of its K responses;
    an unpaired row has a label on each response, mostly one; a demonstration is one response and nothing else; a prompt
    is for a sampler, whatever responses the row has of its own."""

    id: str  # given by the data, else "file:line"
    where: str  # "train.jsonl:412", for messages
    prompt: str | tuple[Message, ...]
    responses: tuple[Response, ...]
    tools: tuple[Any, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # e.g. enable_thinking
    meta: Mapping[str, Any] = field(default_factory=dict)
    chosen_first: bool = False  # the data itself names chosen and rejected, whatever the rewards say
    prompt_embedding: tuple[float, ...] | None = None
    columns: Mapping[str, float] = field(default_factory=dict)  # numbers that a head declares, by name
    prompt_ids: tuple[int, ...] | None = None  # of rollouts: the prompt as it was sampled from
    tokenizer: str | None = None  # the key of the tokenizer that prompt_ids and token_ids are of, where the row says it
    record: str | None = None  # of prompts: all fields as JSON, for reward functions
    privileged: str | tuple[Message, ...] | None = None  # a prompt that knows more, in the same form

    @property
    def kind(self) -> Kind:
        """What the row can feed: by its facts, not by the format it was read from."""
        if self.record is not None:
            return "prompt"
        if all(r.reward is not None for r in self.responses) and len(self.responses) > 1:
            return "set"
        if all(r.label is not None for r in self.responses):
            return "unpaired"
        return "pair" if len(self.responses) == 2 else "demonstration"

    @property
    def is_pair(self) -> bool:
        """True where the first response is preferred by the data's own word; such a row may have rewards too."""
        return self.chosen_first or self.kind == "pair"


@dataclass(frozen=True)
class Example:
    """A row in token ids. Of response k the model sees prompt_ids + response_ids[k]; only the latter is scored.

    A prompt for a sampler has a record, and of responses those that its row brings, mostly none.
    """

    id: str
    where: str
    prompt_ids: tuple[int, ...]  # at least one token, BOS included where the template has one
    response_ids: tuple[tuple[int, ...], ...]  # at least one token each, EOS included where the response really ends
    reward: tuple[float, ...] | None = None
    label: tuple[int, ...] | None = None  # +1 desirable, -1 not, 0 unlabelled; a pair's are (+1, -1)
    logps: tuple[tuple[float, ...], ...] | None = None  # the sampler's, one per response token
    chosen_first: bool = False  # a pair by the data's own word: response 0 is preferred
    columns: tuple[tuple[str, float], ...] = ()  # name and number
    embedding: tuple[tuple[float, ...], ...] | None = None
    prompt_embedding: tuple[float, ...] | None = None
    teacher_ids: tuple[tuple[tuple[int, ...], ...], ...] | None = None  # per response, per token
    teacher_logps: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    teacher_ref_logps: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    ended: tuple[bool, ...] | None = None  # False: its sampler cut it at a limit of length; None: all ended
    record: str | None = None  # of prompts: all fields of the row as JSON, the prompt's text or messages among them
    privileged_ids: tuple[int, ...] | None = None  # the same responses are also scored after this prompt
    response_columns: tuple[tuple[str, tuple[float, ...]], ...] = ()  # name, and a number per response
    token_columns: tuple[tuple[str, tuple[tuple[float, ...], ...]], ...] = ()  # name, and numbers per token of each

    @property
    def is_pair(self) -> bool:
        """True where response 0 is preferred over response 1 by the data's own word."""
        two = len(self.response_ids) == 2 and self.record is None
        return self.chosen_first or (two and self.reward is None and self.label is None)


@dataclass(frozen=True)
class Other:
    """The first so many tokens of a response of another row."""

    example: int
    response: int
    tokens: int


@dataclass(frozen=True)
class Item:
    """One group as a head sees it: some responses of an example in the layout's order (a pair: best first)."""

    example: int
    responses: tuple[int, ...]
    other: Other | None = None  # what follows this prompt in no data: for heads that need a mismatch

"""Sampled responses as a row: their tokens and log-probs where these fit, and all that the row said before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from po.data.tokenize import RowFaultError
from po.prep.chat import TEXT, Reply
from po.prep.rows import ScoredSet

Messages = tuple[Mapping[str, Any], ...]
_FACTS = ("reward", "rank", "label", "logps", "token_ids", "embedding", "teacher")  # on all responses of a row, or none
_OF_TOKENS = ("prompt_ids", "tokenizer")


class Encoding(Protocol):
    """How a model that runs here sees a prompt. key: its tokenizer's."""

    @property
    def key(self) -> str: ...

    def prompt_ids(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Its token ids."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A response that stays, and how it was drawn."""

    reply: Reply
    model: str
    temperature: float
    system: str

    def to_json(self, system_in_prompt: bool) -> dict[str, Any]:
        """As a response of a row."""
        r = self.reply
        out: dict[str, Any] = {"content": r.text, "source": self.model, "temperature": self.temperature}
        if self.system and not system_in_prompt:
            out["system"] = self.system
        if r.finish_reason == "length":
            out["ended"] = False
        if r.logprobs is not None:
            out["logps"] = r.logprobs
        fits = r.logprobs is None or r.token_ids is None or len(r.logprobs) == len(r.token_ids)
        return {**out, "token_ids": r.token_ids} if r.token_ids is not None and fits else out


def with_system(prompt: Messages, system: str) -> Messages:
    """The conversation with this system prompt in the place of its own; "" leaves it as it is."""
    if not system:
        return prompt
    rest = prompt[1:] if prompt[0]["role"] == "system" else prompt
    return ({"role": "system", "content": system}, *rest)


def make_row(
    read: ScoredSet, prompt: Messages, drawn: Sequence[Drawn], add: bool, encoding: Encoding | None, in_prompt: bool
) -> dict[str, Any]:
    """The row with these responses. add: behind its own, which otherwise move into `original`. in_prompt: the system
    prompt, which is then the same for all of them, becomes part of the row's."""
    fields = {k: v for k, v in read.fields.items() if k not in _OF_TOKENS}
    own = [dict(a) for a in read.answers]
    if read.row.chosen_first:
        own = [{**a, "was": side} for a, side in zip(own, ("chosen", "rejected"), strict=True)]
    if own and not add:
        fields["original"] = {**fields.get("original", {}), "responses": own}
        own = []
    shown = with_system(prompt, drawn[0].system) if in_prompt else prompt
    if shown[0]["role"] != TEXT:
        fields["prompt"] = shown
    answers = [*own, *(x.to_json(in_prompt) for x in drawn)]
    ids = _prompt_ids(read, shown, drawn, encoding, in_prompt)
    if own and (read.row.prompt_ids, read.row.tokenizer) != (ids, encoding and encoding.key):
        ids = None
    if ids is not None and all("token_ids" in a for a in answers):
        fields["prompt_ids"] = ids
        fields |= {} if encoding is None else {"tokenizer": encoding.key}
        return {**fields, "responses": [_aside(a, _partly(answers)) for a in answers]}
    return {**fields, "responses": [_aside(a, {*_partly(answers), "token_ids", "logps"}) for a in answers]}


def _prompt_ids(
    read: ScoredSet, shown: Messages, drawn: Sequence[Drawn], encoding: Encoding | None, in_prompt: bool
) -> tuple[int, ...] | None:
    """The tokens of the row's prompt, as the model here or the server has them; None where that is not known."""
    if encoding is not None:
        with suppress(RowFaultError):  # a template may want the system prompt that was drawn
            return encoding.prompt_ids(shown, read.row.tools or (), read.row.template_kwargs)
        return None
    known = {x.reply.prompt_ids for x in drawn if in_prompt or not x.system}
    return known.pop() if len(known) == 1 else None


def _partly(answers: Sequence[Mapping[str, Any]]) -> set[str]:
    """Facts that some of a row's responses have and others do not, which no reader would take."""
    return {f for f in _FACTS if 0 < sum(f in a for a in answers) < len(answers)}


def _aside(answer: Mapping[str, Any], facts: set[str]) -> dict[str, Any]:
    """The response with these facts in an object of their own, where they are kept and not read."""
    moved = {k: v for k, v in answer.items() if k in facts}
    out = {k: v for k, v in answer.items() if k not in facts}
    return {**out, "aside": {**out.get("aside", {}), **moved}} if moved else out

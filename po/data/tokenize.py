"""Rows to token ids. Prompt and responses are rendered together, and the boundary between them is found in token space.

What is scored are the tokens of `prompt + response` after the longest prefix that it shares with the prompt alone and
with the row's other responses. So the ids are exactly the ones a model sees, also where a token spans the boundary.

Text: the tokenizer's own leading special tokens (BOS), once, and EOS after each response, once. Conversations: what
the chat template renders, plus EOS only where the template ends a response without any stop token. A response that
was cut at a limit of length has no end token. Rollouts keep the token ids that were sampled.

A prompt for a sampler is all of its own tokens, and a response that the row brings follows exactly these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from po.data.messages import Messages
from po.data.report import Problem, Say, describe
from po.data.rows import Row, Teacher
from po.errors import UserError

Ids = tuple[int, ...]


class RowFaultError(Exception):
    """A row that cannot be tokenized; carries the problem that the report lists."""

    def __init__(self, where: str, field: str, expected: str, got: object) -> None:
        super().__init__(where)
        self.problem = Problem(where, field, expected, describe(got))


@dataclass(frozen=True)
class Coded:
    """A row's token ids before any length policy. A response may still be empty here."""

    prompt_ids: Ids
    response_ids: tuple[Ids, ...]
    merged: str  # the text of prompt tokens that are scored with the response, mostly ""
    appended: int  # responses whose template ended without a stop token, so that EOS was added
    apart: tuple[int, ...] = ()  # of a prompt: responses that do not continue its tokens, () in response_ids
    privileged_ids: Ids | None = None


class Encoder:
    """Rows to token ids with one Hugging Face tokenizer. Raises UserError where the tokenizer itself is unfit."""

    def __init__(self, tokenizer: Any, key: str | None = None) -> None:
        """key: the tokenizer's, to compare with the one that rollouts name; None: they are believed."""
        self.tokenizer, self.key = tokenizer, key
        self.lead = _leading_specials(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
        self.stops = added - {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} | {self.eos}
        self._blank: dict[int, bool] = {}

    def __call__(self, row: Row) -> Coded:
        """Token ids of a row. Raises RowFaultError for a row that the template or the tokenizer cannot represent."""
        if row.prompt_ids is not None:
            coded = self._as_sampled(row, row.prompt_ids)
        else:
            coded = self._rendered(row)
        if not coded.prompt_ids:
            raise RowFaultError(row.where, "prompt", "at least one token before the response", Say("none"))
        for k, (r, ids) in enumerate(zip(row.responses, coded.response_ids)):
            for name, numbers in {"logps": ids if r.logps is None else r.logps, **r.token_columns}.items():
                if len(numbers) != len(ids):
                    want = f"{len(ids)} numbers, one per token with its end token"
                    raise RowFaultError(row.where, f"responses[{k}].{name}", want, Say(str(len(numbers))))
            if r.teacher is not None:
                self._check_teacher(r.teacher, len(ids), row.where, f"responses[{k}].teacher")
        return coded if row.privileged is None else replace(coded, privileged_ids=self._privileged(row, coded))

    def _privileged(self, row: Row, coded: Coded) -> Ids:
        """The privileged prompt's ids. Responses that are tokenized with it must come out the same."""
        assert row.privileged is not None
        fixed = row.prompt_ids is not None or row.kind == "prompt"
        other = self._rendered(
            replace(row, prompt=row.privileged, record=None, responses=() if fixed else row.responses)
        )
        if not other.prompt_ids:
            raise RowFaultError(row.where, "privileged_prompt", "at least one token before the response", Say("none"))
        for k, (a, b) in enumerate(zip(coded.response_ids, other.response_ids)):
            if a != b:
                at = _agree(a, b)
                found = [repr(self.tokenizer.decode(ids[at : at + 5])) for ids in (b, a)]
                want = f"a prompt after which responses[{k}] has the same tokens"
                raise RowFaultError(row.where, "privileged_prompt", want, Say(" instead of ".join(found)))
        return other.prompt_ids

    def _rendered(self, row: Row) -> Coded:
        if isinstance(row.prompt, str):
            prompt_ids, full, appended = self._text(row)
        else:
            prompt_ids, full, appended = self._conversation(row)
        if row.kind == "prompt":
            n = len(prompt_ids)
            apart = tuple(k for k, ids in enumerate(full) if ids[:n] != prompt_ids)
            return Coded(prompt_ids, tuple(() if k in apart else i[n:] for k, i in enumerate(full)), "", 0, apart)
        shared = _shared_prefix([prompt_ids, *full])
        merged = prompt_ids[shared:]
        responses = tuple(ids[shared:] for ids in full)
        return Coded(prompt_ids[:shared], responses, self.tokenizer.decode(merged) if merged else "", appended)

    def _as_sampled(self, row: Row, prompt_ids: Ids) -> Coded:
        """The ids of a rollout, which must be of this tokenizer."""
        if row.tokenizer is not None and self.key is not None and row.tokenizer != self.key:
            want = f"{self.key[:12]}, the key of this run's tokenizer (the row's token ids are of another)"
            raise RowFaultError(row.where, "tokenizer", want, Say(row.tokenizer[:12]))
        responses = tuple(r.token_ids or () for r in row.responses)
        size = len(self.tokenizer)
        named = [(f"responses[{k}].token_ids", ids) for k, ids in enumerate(responses)]
        for field, ids in [("prompt_ids", prompt_ids), *named]:
            for t, i in enumerate(ids):
                if i >= size:
                    want = f"an id below {size}, the size of the vocabulary"
                    raise RowFaultError(row.where, f"{field}[{t}]", want, Say(str(i)))
        return Coded(prompt_ids, responses, "", 0)

    def _check_teacher(self, teacher: Teacher, tokens: int, where: str, field: str) -> None:
        if len(teacher.ids) != tokens:
            want = f"{tokens} lists, one per token with its end token"
            raise RowFaultError(where, f"{field}.ids", want, Say(str(len(teacher.ids))))
        size = len(self.tokenizer)
        for t, some in enumerate(teacher.ids):
            if some and max(some) >= size:
                want = f"ids below {size}, the size of the vocabulary"
                raise RowFaultError(where, f"{field}.ids[{t}]", want, Say(str(max(some))))

    def stops_at_end(self, ids: Sequence[int]) -> bool:
        """Whether a response ends with a stop token: EOS, or the special token with which a template ends a turn.

        White space that the template renders after it does not count.
        """
        for i in reversed(ids):
            if i in self.stops:
                return True
            if i not in self._blank:
                self._blank[i] = not self.tokenizer.decode([i]).strip()
            if not self._blank[i]:
                return False
        return False

    def _without_end(self, ids: Ids) -> Ids:
        """Without the stop token at the end and the white space behind it."""
        if not self.stops_at_end(ids):
            return ids
        return ids[: max(n for n, i in enumerate(ids) if i in self.stops)]

    def _ids(self, texts: list[str]) -> list[Ids]:
        out = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [tuple(ids) for ids in out]

    def _text(self, row: Row) -> tuple[Ids, list[Ids], int]:
        if self.eos is None:
            raise UserError(
                f"{row.where}: the tokenizer has no eos_token, so a plain text response cannot end. Set eos_token in "
                "the tokenizer's files, or write the rows as messages for a chat template"
            )
        texts = [str(row.prompt), *(f"{row.prompt}{r.content}" for r in row.responses)]
        ids = [i if i[: len(self.lead)] == self.lead else self.lead + i for i in self._ids(texts)]
        ends = [i[-1:] == (self.eos,) or not r.ended for i, r in zip(ids[1:], row.responses)]
        return ids[0], [i if end else (*i, self.eos) for i, end in zip(ids[1:], ends)], 0

    def _conversation(self, row: Row) -> tuple[Ids, list[Ids], int]:
        assert not isinstance(row.prompt, str)
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{row.where}: the prompt is a conversation, but the tokenizer has no chat template. Name a Jinja file "
                "in model.chat_template, or write prompt and responses as plain text"
            )
        prompt = self._render(row, row.prompt, True)
        full = [self._render(row, (*row.prompt, *_messages(r.content)), False) for r in row.responses]
        if row.kind != "prompt":
            _check_prompt_kept(row, prompt, full)
        prompt_ids, *ids = self._ids([prompt, *full])
        ids = [i if r.ended else self._without_end(i) for i, r in zip(ids, row.responses)]
        ends = [self.stops_at_end(i) or not r.ended for i, r in zip(ids, row.responses)]
        if self.eos is not None:
            ids = [i if end else (*i, self.eos) for i, end in zip(ids, ends)]
        return prompt_ids, ids, ends.count(False)

    def _render(self, row: Row, conversation: Messages, generation: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(m) for m in conversation],
                tools=list(row.tools) if row.tools else None,
                add_generation_prompt=generation,
                tokenize=False,
                **row.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            said = f"{type(e).__name__}: {e}"
            raise RowFaultError(
                row.where, "messages", "a conversation that the chat template accepts", Say(said)
            ) from e
        return str(rendered)


def _messages(content: str | Messages) -> Messages:
    return ({"role": "assistant", "content": content},) if isinstance(content, str) else content


def _leading_specials(tokenizer: Any) -> Ids:
    """What the tokenizer itself puts before a text, e.g. (BOS,). What it puts after one is not taken over: EOS belongs
    to where a response really ends."""
    bare = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = tuple(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return ()


def _shared_prefix(sequences: Sequence[Ids]) -> int:
    return _agree(min(sequences), max(sequences))  # in lexicographic order, these two differ earliest


def _agree(a: Sequence[object], b: Sequence[object]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _check_prompt_kept(row: Row, prompt: str, full: Sequence[str]) -> None:
    """Once a response follows, a template may render the generation header differently, but not the messages before."""
    last = str(row.prompt[-1].get("content", "")).strip()  # type: ignore[union-attr]
    end = prompt.rfind(last) + len(last)
    if not last or end < len(last):
        return
    for k, text in enumerate(full):
        same = _agree(prompt, text[: len(prompt)]) if not text.startswith(prompt) else len(prompt)
        if same < end:
            want = "a chat template that renders the prompt the same with and without a response"
            got = Say(f"{prompt[same : same + 20]!r} without and {text[same : same + 20]!r} with responses[{k}]")
            raise RowFaultError(row.where, "prompt", want, got)

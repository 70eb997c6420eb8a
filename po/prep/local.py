"""A model folder (or hub name) that answers in this process, by the sampler of `po.rollout`.

Conversations need a chat template. A message of role `text` is continued as it is; so is a single user's message where
the tokenizer has no template. The answers are a function of the weights, the requests and which are made together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from po.data.rows import Response, Row
from po.data.tokenize import Encoder, RowFaultError
from po.errors import UserError
from po.policy import load_frozen, load_tokenizer, plainly, tokenizer_key
from po.prep.chat import TEXT, Answer, Ask, Numbered, Reply
from po.process import quiet
from po.rollout.assemble import stop_ids
from po.rollout.hf import HFSampler
from po.rollout.sampler import Sampled, Sampling
from po.spec import ModelSpec

Ids = tuple[int, ...]


class Local:
    """A Chat with a model here. Log-probs, of drawn and of likeliest tokens, are under softmax(logits / temperature)
    (temperature 0: at 1), before top_p, end token included."""

    def __init__(self, model: str, *, dtype: str = "auto", device: str | None = None, sequences: int = 64) -> None:
        """sequences: how many are generated at once. Raises UserError where there is no such model. The weights are
        loaded when first asked."""
        self.name, self._sequences = model, sequences
        self._spec = ModelSpec(model, dtype=dtype)  # type: ignore[arg-type]
        self._wanted = device
        self._numbered = Numbered(model)
        quiet()
        self.tokenizer = load_tokenizer(self._spec)
        self._encoder = Encoder(self.tokenizer)

    @cached_property
    def key(self) -> str:
        """The tokenizer's, as rows with token ids carry it."""
        return tokenizer_key(self.tokenizer)

    @cached_property
    def _device(self) -> str:
        return self._wanted or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _net(self) -> Any:
        with plainly():
            return load_frozen(self._spec).to(self._device)

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """In as few calls of the sampler as there are ways to draw. A prompt that does not fit is a problem."""
        keys, answers = self._numbered(asks), [Answer()] * len(asks)
        ways: dict[Sampling, dict[int, Ids]] = {}
        for i, ask in enumerate(asks):
            try:
                prompt = self.prompt_ids(ask.messages, ask.tools, ask.template_kwargs)
            except RowFaultError as e:
                answers[i] = Answer(problem=f"{e.problem.field}: expected {e.problem.expected}, got {e.problem.got}")
                continue
            if (most := self._room()) is not None and len(prompt) + ask.max_tokens > most:
                answers[i] = Answer(
                    problem=f"prompt and max_tokens are more than the {most} tokens that the model takes"
                )
                continue
            ways.setdefault(Sampling(ask.max_tokens, ask.temperature, ask.top_p), {})[i] = prompt
        for way, prompts in ways.items():
            sampler = self._sampler(way)
            seeds = [_seed(asks[i], keys[i]) for i in prompts]
            drawn = sampler.sample(list(prompts.values()), [asks[i].n for i in prompts], seeds)
            for (i, prompt), samples in zip(prompts.items(), drawn, strict=True):
                answers[i] = self._answer(asks[i], prompt, samples)
        return answers

    def _sampler(self, way: Sampling) -> HFSampler:
        stops, pad = stop_ids(self._net, self.tokenizer), self.tokenizer.pad_token_id
        return HFSampler(self._net, way, stops, pad, self._device, sequences_per_call=self._sequences)

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Ids:
        """The tokens that an answer follows. Raises RowFaultError where the template refuses, UserError where there is
        none and one is needed."""
        return self._encoder(self._row(messages, tools, template_kwargs)).prompt_ids

    def _row(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        answers: Sequence[str] = (),
    ) -> Row:
        plain = len(messages) == 1 and (
            messages[0]["role"] == TEXT or (messages[0]["role"] == "user" and not self.tokenizer.chat_template)
        )
        prompt: Any = messages[0]["content"] if plain else tuple(messages)
        if not plain and not self.tokenizer.chat_template:
            raise UserError(
                f"--model {self.name}: its tokenizer has no chat template, which a conversation needs; expected one, "
                "or prompts of plain text"
            )
        responses = tuple(Response(answer) for answer in answers)
        return Row("ask", "ask", prompt, responses, tuple(tools) or None, template_kwargs, record="{}")

    def _room(self) -> int | None:
        config = self._net.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    def _answer(self, ask: Ask, prompt: Ids, samples: Sequence[Sampled]) -> Answer:
        replies = tuple(self._reply(ask, prompt, s) for s in samples)
        sums = {"requests": 1, "prompt tokens": len(prompt), "completion tokens": sum(len(s.ids) for s in samples)}
        return Answer(replies, sums=sums)

    def _reply(self, ask: Ask, prompt: Ids, sampled: Sampled) -> Reply:
        text = self._text(prompt, sampled.ids)
        reply = Reply(text, "stop" if sampled.ended else "length", token_ids=sampled.ids, prompt_ids=prompt)
        if ask.logprobs or ask.top_logprobs:
            reply = replace(reply, logprobs=sampled.logps)
        if ask.top_logprobs:
            reply = replace(reply, top=self._top(ask, prompt, sampled.ids))
        ends = [at for at in map(text.find, ask.stop) if at >= 0]
        reply = self._cut(reply, prompt, sampled.ids, min(ends)) if ends else reply
        return replace(reply, text=reply.text.lstrip()) if self._spaced(ask, text, sampled.ids) else reply

    def _spaced(self, ask: Ask, text: str, ids: Ids) -> bool:
        """Whether the template itself writes the space that the answer begins with: `[/INST] answer`. As a message it
        would otherwise have two, and other tokens."""
        if not text[:1].isspace():
            return False
        row = self._row(ask.messages, ask.tools, ask.template_kwargs, (text.lstrip(),))
        if isinstance(row.prompt, str):
            return False
        return self._encoder(row).response_ids[0][: len(ids)] == ids

    def _cut(self, reply: Reply, prompt: Ids, ids: Ids, at: int) -> Reply:
        """What stands before a stop text. The last token may go over it, so there are no token ids."""
        n = next(n for n in range(len(ids) + 1) if len(self._text(prompt, ids[:n])) >= at)
        logps, top = reply.logprobs and reply.logprobs[:n], reply.top and reply.top[:n]
        return Reply(reply.text[:at], "stop", logps, top, prompt_ids=prompt)

    def _text(self, prompt: Ids, ids: Ids) -> str:
        """What the tokens add to the prompt's text: alone, some tokenizers would take a space off their beginning."""
        before, whole, alone = (
            str(self.tokenizer.decode(list(some), skip_special_tokens=True)) for some in (prompt, prompt + ids, ids)
        )
        return whole[len(before) :] if whole.startswith(before) else alone

    @torch.no_grad()
    def _top(self, ask: Ask, prompt: Ids, ids: Ids) -> tuple[Mapping[str, float], ...]:
        """The likeliest tokens at each place of an answer; of several with one text the likeliest."""
        logits_NV = self._net(input_ids=torch.tensor([[*prompt, *ids]], device=self._device)).logits[0]
        logp_TV = (logits_NV[len(prompt) - 1 : -1].float() / (ask.temperature or 1.0)).log_softmax(-1)
        top = logp_TV.topk(min(ask.top_logprobs, logp_TV.shape[-1]))
        out = []
        for logps, tokens in zip(top.values.tolist(), top.indices.tolist()):
            place: dict[str, float] = {}
            for token, logp in zip(tokens, logps):
                place.setdefault(str(self.tokenizer.decode([token])), logp)
            out.append(place)
        return tuple(out)


def _seed(ask: Ask, key: str) -> int:
    """A request's own, else one by what it says."""
    if ask.seed is not None:
        return ask.seed
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")

"""Models behind an OpenAI-compatible server (vLLM, llama.cpp, OpenAI and others), through the package `openai`.

Retries with growing pauses, waiting as long as the server says, and time limits are that package's. The key is read
from an environment variable; it is in no file, report or message, and no answer that echoes it keeps it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from po.errors import UserError
from po.folder import redact
from po.prep.answers import read_answer, reply, tokens
from po.prep.calls import Journal
from po.prep.chat import TEXT, Answer, Ask, Numbered, Reply

_FATAL = {401: "the key is not accepted", 403: "the key may not use it", 404: "there is no such model or address"}
_LEAST_KEY = 8  # characters; what is shorter is no secret, and stands in answers by chance


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server and how it is asked."""

    model: str
    url: str  # the base URL, mostly ending in /v1
    key_env: str | None = None  # the environment variable that holds the key
    concurrency: int = 16  # requests at a time
    timeout: float = 120.0  # seconds, of one try of a request
    retries: int = 5  # of a request, after its first try
    price_in: float | None = None  # $ per million tokens of prompts
    price_out: float | None = None  # $ per million tokens of answers
    token_ids: bool = False  # ask for token ids, which vLLM gives

    def cost(self, prompt: int, completion: int) -> dict[str, float]:
        """What a request cost, where prices are known."""
        if self.price_in is None and self.price_out is None:
            return {}
        return {"cost ($)": (prompt * (self.price_in or 0) + completion * (self.price_out or 0)) / 1e6}


class Endpoint:
    """A Chat with a server. What was answered is in the journal, and is not asked again."""

    def __init__(self, service: Service, journal: Path | None = None, *, read_only: bool = False) -> None:
        """Raises UserError where the key's variable is not set, or the package `openai` is not installed."""
        self.name, self._service = service.model, service
        self._key = _key(service.key_env)
        self._journal, self._numbered = Journal(journal, read_only), Numbered(service.model)
        try:
            import openai  # noqa: F401
        except ImportError as e:
            raise UserError("--url needs the package openai; run `pip install 'po[prep]'`") from e

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """All at once, at most `concurrency` requests at a time. Raises UserError where the server is not there, or
        refuses key, model or address: nothing else would work either."""
        keys = self._numbered(asks)
        try:
            return asyncio.run(self._all(asks, keys))
        finally:
            self._journal.sync()

    async def _all(self, asks: Sequence[Ask], keys: Sequence[str]) -> list[Answer]:
        from openai import AsyncOpenAI

        s = self._service
        made = AsyncOpenAI(api_key=self._key or "none", base_url=s.url, timeout=s.timeout, max_retries=s.retries)
        made.organization = made.project = None  # which the environment may name for another server
        free = asyncio.Semaphore(s.concurrency)
        async with made as client:
            tasks = [asyncio.create_task(self._one(client, free, a, k)) for a, k in zip(asks, keys, strict=True)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, client: Any, free: asyncio.Semaphore, ask: Ask, key: str) -> Answer:
        """One request's answer; of several, where the server gives fewer replies at a time than asked for."""
        replies: list[Reply] = []
        sums: dict[str, float] = {}
        problem, part = None, 0
        while len(replies) < ask.n and problem is None:
            line = self._journal[f"{key}.{part}"]
            if line is None:
                async with free:
                    line = await self._request(client, ask, len(replies))
                if "problem" not in line:
                    self._journal.add(f"{key}.{part}", {"model": self.name, "of": ask.of, **line})
            for name, value in line["sums"].items():
                sums[name] = sums.get(name, 0) + value
            found = [reply(r) for r in line.get("replies", ())]
            problem = line.get("problem") or _lacking(ask, found)
            replies, part = replies + found, part + 1
        return Answer(() if problem else tuple(replies[: ask.n]), problem, sums)

    async def _request(self, client: Any, ask: Ask, have: int) -> dict[str, Any]:
        """A line for the journal: replies and sums; or a problem."""
        import openai

        where = f"{redact(self._service.url)}: model {self.name!r}"
        text = any(m["role"] == TEXT for m in ask.messages)
        if text and len(ask.messages) != 1:
            return {"problem": "a plain text and other messages in one request", "sums": {}}
        if ask.tools:
            return {"problem": "a prompt with tools, which servers are not asked with", "sums": {}}
        call = client.completions if text else client.chat.completions
        try:
            raw = await call.with_raw_response.create(**self._body(ask, have, text))
            found = raw.parse()
            prompt, completion = tokens(found)
            sums = {
                "requests": 1,
                "retries": raw.retries_taken,
                "prompt tokens": prompt,
                "completion tokens": completion,
            }
            return {"replies": self._clean(read_answer(found)), "sums": sums | self._service.cost(prompt, completion)}
        except openai.APIStatusError as e:
            said = f"HTTP {e.status_code}: {self._clean(_said(e))}"
            if e.status_code in _FATAL:
                why = _FATAL[e.status_code]
                raise UserError(f"{where}: {why} ({said}). Check --url, --model and --key-env") from None
            return _failed(said, e)
        except openai.APITimeoutError as e:
            return _failed(f"no answer within {self._service.timeout:g} s", e)
        except openai.APIConnectionError as e:
            if type(e.__cause__).__name__ == "ConnectError":  # of httpx or httpx2
                raise UserError(
                    f"{where}: nobody answers there ({self._clean(str(e.__cause__))}). Start the server or check "
                    "--url; the same command goes on where this one stopped"
                ) from None
            return _failed(f"the connection broke: {type(e.__cause__).__name__}", e)
        except (ValueError, TypeError, AttributeError, openai.OpenAIError) as e:
            said = f"the server's answer cannot be read: {type(e).__name__}: {self._clean(str(e))[:200]}"
            return {"problem": said, "sums": {"requests": 1}}

    def _body(self, ask: Ask, have: int, text: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "n": ask.n - have, "temperature": ask.temperature}
        body |= {"top_p": ask.top_p, "max_tokens": ask.max_tokens}
        if ask.seed is not None:
            body["seed"] = ask.seed + have
        if ask.stop:
            body["stop"] = list(ask.stop)
        more: dict[str, Any] = {"return_token_ids": True} if self._service.token_ids else {}
        if ask.template_kwargs and not text:
            more["chat_template_kwargs"] = dict(ask.template_kwargs)
        if more:
            body["extra_body"] = more
        scored = ask.logprobs or ask.top_logprobs > 0
        if text:
            return (
                body
                | {"prompt": ask.messages[0]["content"]}
                | ({"logprobs": max(1, ask.top_logprobs)} if scored else {})
            )
        body["messages"] = [dict(m) for m in ask.messages]
        return body | ({"logprobs": True} if scored else {}) | ({"top_logprobs": n} if (n := ask.top_logprobs) else {})

    def _clean(self, said: Any) -> Any:
        """Without the key, wherever a server echoes it."""
        if isinstance(said, dict):
            return {self._clean(k): self._clean(v) for k, v in said.items()}
        if isinstance(said, list):
            return [self._clean(v) for v in said]
        hide = isinstance(said, str) and self._key and len(self._key) >= _LEAST_KEY
        return said.replace(self._key, "[redacted]") if hide else said


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or not os.environ.get(name):
        raise UserError(
            "--key-env: expected the name of an environment variable that holds the key, and it to be set; got "
            + (f"{name}, which is not set" if name.isupper() else "another word (not shown: it could be the key)")
        )
    return os.environ[name]


def _lacking(ask: Ask, found: Sequence[Reply]) -> str | None:
    if not found:
        return "the server gave no reply"
    if ask.top_logprobs and any(r.top is None for r in found):
        return "the server gave no likeliest tokens (top_logprobs)"
    return None


def _said(error: Any) -> str:
    """What a server said of an error, in one line."""
    body = error.body if isinstance(error.body, dict) else {}
    return " ".join(str(body.get("message") or error.message).split())[:300]


def _failed(problem: str, error: Any) -> dict[str, Any]:
    retries = int(error.request.headers.get("x-stainless-retry-count", 0))
    return {"problem": problem, "sums": {"requests": 1, "retries": retries}}

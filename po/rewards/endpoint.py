"""A reward behind HTTP: POST {"prompts", "completions", "columns"} as JSON, answered by {"rewards": [...]} or a list.

The address's query and user info, and the token, appear in no message. Redirects are not followed, so that the token
goes nowhere else.
"""

from __future__ import annotations

import base64
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from po.rewards.cells import Call, Counted, Failure, failed

_MOST = 64 << 20  # bytes of an answer
_AGAIN = (408, 425, 429)  # and 5xx: what may pass


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Posts the completions in batches; each batch is tried again, with growing pauses, where that can help."""

    url: str
    batch_size: Annotated[int, Ge(1)] = 32  # completions per request
    concurrency: Annotated[int, Ge(1), Le(64)] = 1  # requests at a time
    request_timeout: Annotated[float, Gt(0)] = 30.0  # seconds without a byte, per request
    retries: Annotated[int, Ge(0)] = 3  # of a batch, after its first request
    backoff: Annotated[float, Ge(0)] = 0.5  # seconds before the first retry, doubled for each further one, up to 30
    token_env: str | None = None  # the environment variable that holds a bearer token
    columns: tuple[str, ...] | None = None  # which columns of the rows are sent; None: all
    rows = False

    def load(self) -> None:
        """Nothing: the service may come up later."""

    def patience(self, seconds: float) -> float:
        """It keeps the time itself, request by request; this is for what it cannot, such as a name lookup."""
        return seconds + min(self.request_timeout, seconds) + 5

    def answers(self, call: Call) -> Iterator[Counted]:
        """All of them at once. A batch that failed fails its own completions only."""
        until = time.monotonic() + call.seconds
        retries: list[int] = []  # appended to by several threads
        parts = [call.part(i, i + self.batch_size) for i in range(0, len(call), self.batch_size)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            found = list(pool.map(lambda part: self._batch(part, until, retries), parts))
        yield Counted([one for values in found for one in values], {"retry": len(retries)})

    def _batch(self, call: Call, until: float, retries: list[int]) -> list[Any]:
        failure = Failure("timeout", f"was not asked within the {call.seconds:g} s of a call")
        for attempt in range(self.retries + 1):
            left = until - time.monotonic()
            if left <= 0:
                break
            retries += [attempt] if attempt else []
            try:
                values = self._rewards(self._post(call, min(left, self.request_timeout)))
                if len(values) == len(call):
                    return values
                failure = Failure("count", f"returned {len(values)} rewards for {len(call)} completions")
            except urllib.error.HTTPError as e:
                failure = Failure("raised", f"HTTP {e.code} {e.reason}")
                if e.code < 500 and e.code not in _AGAIN:
                    break
            except (
                OSError,
                ValueError,
            ) as e:  # URLError and TimeoutError are OSErrors, a broken answer is a ValueError
                reason = e.reason if isinstance(e, urllib.error.URLError) else e
                failure = failed(reason if isinstance(reason, OSError) else e)
            pause = min(30.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
            if attempt < self.retries:
                time.sleep(max(0.0, min(pause, until - time.monotonic())))
        return [replace(failure, text=self._clean(failure.text))] * len(call)

    def _post(self, call: Call, seconds: float) -> Any:
        names = call.columns if self.columns is None else [n for n in self.columns if n in call.columns]
        columns = {name: call.columns[name] for name in names}
        body = {"prompts": call.prompts, "completions": call.completions, "columns": columns}
        address, headers = self._address()
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        until = time.monotonic() + seconds
        with opener.open(request, timeout=seconds) as answer:
            content = b""
            while some := answer.read1(1 << 16):
                content += some
                if len(content) > _MOST:
                    raise ValueError(f"the answer is longer than {_MOST >> 20} MiB")
                if time.monotonic() > until:
                    raise TimeoutError("the answer was not complete in time")
        return json.loads(self._clean(content.decode()))  # a server may echo the token

    def _address(self) -> tuple[str, dict[str, str]]:
        """The address without user info, and the headers, which carry that or the token."""
        parts = urllib.parse.urlsplit(self.url)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), headers

    def _rewards(self, answer: Any) -> list[Any]:
        values = answer.get("rewards") if isinstance(answer, dict) else answer
        if not isinstance(values, list):
            raise ValueError('the answer has no rewards; expected {"rewards": [...]} or a list')
        return values

    def _clean(self, text: str) -> str:
        token = os.environ.get(self.token_env) if self.token_env else None
        return text.replace(token, "[redacted]") if token else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """None makes urllib raise the redirect as an HTTPError."""

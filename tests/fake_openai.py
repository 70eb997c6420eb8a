"""An OpenAI-compatible server on this machine whose answers come from a Python function.

    with FakeOpenAI(lambda body: "4") as server:
        Endpoint(Service(model="m", url=server.url))

The function is given a request's body and returns what every choice says: a text, a list of texts (one per choice), a
dict that is sent as it is, or an int, which is a status. It runs in one of many threads.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = str | list[str] | dict[str, Any] | int
Body = dict[str, Any]


class FakeOpenAI:
    """Serves while it is a context. `bodies`: what it was sent, failures included; `headers`: of each, with "path"
    among them; `most`: how many requests were answered at once."""

    def __init__(self, answer: Callable[[Body], Said], *, delay: float = 0.0, failures: int = 0, status: int = 500):
        """delay: seconds before each answer. failures: the first so many requests fail with `status` (0: hang up)."""
        self.answer, self.delay, self.failures, self.status = answer, delay, failures, status
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeOpenAI:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, path: str, headers: Mapping[str, str], body: Body) -> tuple[int, bytes]:
        """Status and content for one request; status 0 hangs up."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append({k.lower(): v for k, v in headers.items()} | {"path": path})
            fails = self.failures > 0
            self.failures -= fails
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            time.sleep(self.delay)
            said = self.status if fails else self.answer(body)
        finally:
            with self._lock:
                self._now -= 1
        if isinstance(said, int):
            return said, json.dumps({"error": {"message": f"failed as asked: {said}"}}).encode()
        return 200, json.dumps(said if isinstance(said, dict) else completion(body, said)).encode()


def completion(body: Body, said: str | list[str], **more: Any) -> dict[str, Any]:
    """A chat completion (or, for a body with a prompt, a completion): one token per word, each of log-prob -0.5."""
    texts = [said] * body.get("n", 1) if isinstance(said, str) else said
    if "prompt" in body:
        choices = [_text_choice(body, i, text) for i, text in enumerate(texts)]
        asked = body["prompt"]
    else:
        choices = [_chat_choice(body, i, text) for i, text in enumerate(texts)]
        asked = " ".join(str(m["content"]) for m in body["messages"])
    usage = {"prompt_tokens": len(asked.split()), "completion_tokens": sum(len(t.split()) for t in texts)}
    usage["total_tokens"] = sum(usage.values())
    kind = "text_completion" if "prompt" in body else "chat.completion"
    facts = {"id": "c", "object": kind, "created": 0, "model": body["model"]}
    return {**facts, "choices": choices, "usage": usage, **more}


def _chat_choice(body: Body, index: int, text: str) -> dict[str, Any]:
    choice = {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if not body.get("logprobs"):
        return {**choice, "logprobs": None}
    places = [{"token": w, "bytes": None, "logprob": -0.5, "top_logprobs": _top(body, w)} for w in text.split()]
    return {**choice, "logprobs": {"content": places, "refusal": None}}


def _top(body: Body, word: str) -> list[dict[str, Any]]:
    names = [word, *(f"other{k}" for k in range(1, body.get("top_logprobs", 0)))]
    return [
        {"token": w, "bytes": None, "logprob": -0.5 - k} for k, w in enumerate(names[: body.get("top_logprobs", 0)])
    ]


def _text_choice(body: Body, index: int, text: str) -> dict[str, Any]:
    choice = {"index": index, "finish_reason": "stop", "text": text, "logprobs": None}
    if body.get("logprobs"):
        words = text.split()
        top = [{w: -0.5} for w in words]
        choice["logprobs"] = {"tokens": words, "token_logprobs": [-0.5] * len(words), "top_logprobs": top}
    return choice


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _handler(fake: FakeOpenAI) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = fake.respond(self.path, dict(self.headers), body)
            self.close_connection = status == 0
            if status:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # who asked has gone
                    self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    return Handler

"""Rewards behind HTTP, against a real server that fails, stalls and lies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from po.rewards import Rewards, build_rewards
from po.spec import RewardSpec

SECRET = "s3cr3t-token-value"
Answer = Callable[[dict[str, Any], int], tuple[int, bytes]]


class Judge:
    """A server whose answers the test chooses; remembers what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer: Answer = lambda body, n: (
            200,
            json.dumps({"rewards": [len(c) for c in body["completions"]]}).encode(),
        )
        self.headers: dict[str, str] = {}
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append((self.path, dict(self.headers), body))
                code, content = judge.answer(body, len(judge.requests))
                if code == 0:  # hang up
                    return
                self.send_response(code)
                for name, value in judge.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"


@pytest.fixture
def judge() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(url: str, completions: list[str], timeout: float = 30.0, **options: Any) -> tuple[list[Any], Rewards]:
    spec = RewardSpec(url=url, name="judge", timeout=timeout, options={"backoff": 0.01} | options)
    rewards = build_rewards([spec])
    try:
        return rewards(
            ["q"] * len(completions), completions, columns={"answer": list(range(len(completions)))}
        ), rewards
    finally:
        rewards.close()


def test_batches(judge: Judge) -> None:
    scored, rewards = ask(judge.url, ["a" * n for n in range(5)], batch_size=2, concurrency=2)
    assert [s.reward for s in scored] == [0, 1, 2, 3, 4]
    sent = sorted((body for _, _, body in judge.requests), key=lambda b: b["completions"])
    assert sent[1] == {"prompts": ["q", "q"], "completions": ["aa", "aaa"], "columns": {"answer": [2, 3]}}
    assert [len(b["completions"]) for b in sent] == [2, 2, 1]
    assert not rewards.counts


def test_columns_are_chosen_and_a_bare_list_will_do(judge: Judge) -> None:
    judge.answer = lambda body, n: (200, b"[0.5, null]")
    scored, _ = ask(judge.url, ["a", "b"], columns=[])
    assert [s.reward for s in scored] == [0.5, None]
    assert judge.requests[0][2]["columns"] == {}


@pytest.mark.parametrize(
    "bad", [(503, b"busy"), (429, b""), (0, b""), (200, b"<html>"), (200, b"[1]"), (200, b'{"x": 1}')]
)
def test_what_may_pass_is_tried_again(judge: Judge, bad: tuple[int, bytes]) -> None:
    judge.answer = lambda body, n: bad if n < 3 else (200, b"[1, 2]")
    scored, rewards = ask(judge.url, ["a", "b"])
    assert [s.reward for s in scored] == [1, 2]
    assert rewards.counts == {"judge/retry": 2}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ((500, b""), "judge/raised: HTTP 500 Internal Server Error"),
        ((200, b"<html>"), "judge/raised: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ((200, b"[1]"), "judge/count: returned 1 rewards for 2 completions"),
        (
            (200, b'{"score": 1}'),
            'judge/raised: ValueError: the answer has no rewards; expected {"rewards": [...]} or a list',
        ),
    ],
)
def test_a_batch_that_stays_bad_is_unscored(judge: Judge, bad: tuple[int, bytes], problem: str) -> None:
    judge.answer = lambda body, n: bad if "x" in body["completions"] else (200, b"[1, 2]")
    scored, rewards = ask(judge.url, ["x", "b", "c", "d"], batch_size=2, retries=2)
    assert [s.reward for s in scored] == [None, None, 1, 2]
    assert scored[0].problems == (problem,)
    assert rewards.counts == {"judge/retry": 2, problem.partition(":")[0]: 2, "unscored": 2}


def test_what_cannot_pass_is_not_tried_again(judge: Judge) -> None:
    judge.answer = lambda body, n: (404, b"")
    scored, rewards = ask(judge.url, ["a"])
    assert scored[0].problems == ("judge/raised: HTTP 404 Not Found",)
    assert rewards.counts == {"judge/raised": 1, "unscored": 1}


def test_values_that_are_no_numbers_fail_alone(judge: Judge) -> None:
    judge.answer = lambda body, n: (200, b'[1, NaN, "0.5", -Infinity, [1], 1e999]')
    scored, rewards = ask(judge.url, list("abcdef"))
    assert [s.reward for s in scored] == [1, None, None, None, None, None]
    assert rewards.counts == {"judge/nan": 1, "judge/type": 2, "judge/inf": 2, "unscored": 5}


def test_a_server_that_stalls(judge: Judge) -> None:
    def stall(body: dict[str, Any], n: int) -> tuple[int, bytes]:
        if "slow" in body["completions"]:
            time.sleep(3)
        return 200, b"[1]"

    judge.answer = stall
    scored, rewards = ask(judge.url, ["slow", "fast"], batch_size=1, request_timeout=0.2, retries=1)
    assert [s.reward for s in scored] == [None, 1]
    assert rewards.counts == {"judge/retry": 1, "judge/timeout": 1, "unscored": 1}


def test_the_time_of_a_call_bounds_all_requests(judge: Judge) -> None:
    judge.answer = lambda body, n: (time.sleep(0.4), (200, b"[1]"))[1]
    scored, rewards = ask(judge.url, list("abcdef"), timeout=1.0, batch_size=1)
    assert scored[0].reward == 1
    assert scored[-1].problems == ("judge/timeout: was not asked within the 1 s of a call",)
    assert rewards.counts["judge/timeout"] == rewards.counts["unscored"] >= 3


def test_nobody_listens(judge: Judge) -> None:
    judge.server.shutdown()
    judge.server.server_close()
    scored, _ = ask(judge.url, ["a"], retries=1)
    assert scored[0].reward is None
    assert scored[0].problems[0].startswith("judge/raised: ConnectionRefusedError")


def test_the_token_is_sent_and_never_shown(judge: Judge, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    judge.answer = lambda body, n: (200, json.dumps([f"you sent {SECRET}"]).encode())
    scored, rewards = ask(judge.url + "?key=querysecret", ["a"], token_env="JUDGE_TOKEN")
    path, headers, _ = judge.requests[0]
    assert (path, headers["Authorization"]) == ("/score?key=querysecret", f"Bearer {SECRET}")
    shown = f"{scored}{rewards.texts}{rewards.counts}{capfd.readouterr()}"
    assert SECRET not in shown
    assert "querysecret" not in shown


def test_user_info_becomes_a_header(judge: Judge) -> None:
    ask(judge.url.replace("://", "://me:p%40ss@"), ["a"])
    assert judge.requests[0][1]["Authorization"] == "Basic bWU6cEBzcw=="


def test_redirects_are_not_followed(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    other = Judge()
    judge.headers, judge.answer = {"Location": other.url}, lambda body, n: (302, b"")
    scored, _ = ask(judge.url, ["a"], token_env="JUDGE_TOKEN")
    other.server.shutdown()
    other.server.server_close()
    assert scored[0].problems == ("judge/raised: HTTP 302 Found",)
    assert other.requests == []

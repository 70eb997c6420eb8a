"""The verifier that runs programs: verdicts, limits, isolation."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from po.errors import UserError
from po.rewards import Scored, build_rewards
from po.rewards.code import isolation, program_of
from po.spec import RewardSpec

needs_isolation = pytest.mark.skipif(isolation() is None, reason="this machine has no unprivileged namespaces")

GOOD = "def double(x):\n    return 2 * x\n"


def run_code(program: str, tests: Any, **options: Any) -> tuple[Scored, dict[str, int]]:
    rewards = build_rewards([RewardSpec(verifier="code", options={"memory_mb": 256, "time_limit": 5} | options)])
    try:
        return rewards(["q"], [program], columns={"tests": [tests]})[0], dict(rewards.counts)
    finally:
        rewards.close()


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests", "reward"),
    [
        (f"Here:\n```python\n{GOOD}```\nDone.", "assert double(2) == 4", 1.0),
        (GOOD, ["assert double(2) == 4", "assert double(2) == 5"], 0.0),
        ("import sys\nsys.exit(0)", "assert double(2) == 4", 0.0),
        ("import os\nos._exit(0)", "assert double(2) == 4", 0.0),
        ("def double(x", "assert double(2) == 4", 0.0),
        ("print(int(input()) * 2)", [{"input": "3\n", "output": "6"}, {"input": "0", "output": "0\n"}], 1.0),
        ("print(7)", [{"input": "3\n", "output": "6"}], 0.0),
        (GOOD, None, None),
    ],
)
def test_code(program: str, tests: Any, reward: float | None) -> None:
    assert run_code(program, tests)[0].reward == reward


@needs_isolation
def test_code_in_parts() -> None:
    tests = ["assert double(2) == 4", "assert double(2) == 5", "assert double(0) == 0", "import nothing_here"]
    assert run_code(GOOD, tests, partial=True)[0].reward == 0.5


@needs_isolation
def test_code_is_limited_in_time_and_memory() -> None:
    scored, counts = run_code("while True: pass", "", time_limit=0.5)
    assert (scored.reward, counts) == (0.0, {"code/program_timeout": 1})
    scored, counts = run_code("x = bytearray(10**9)", "")
    assert (scored.reward, counts) == (0.0, {"code/program_memory": 1})
    assert run_code("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "")[0].reward == 0.0


@needs_isolation
def test_code_has_no_network_no_secrets_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import os, socket\nassert 'MY_SECRET' not in os.environ\nassert os.listdir() == []\n{GOOD}"
        reach = f"socket.create_connection(('127.0.0.1', {port}), 2)"
        test = f"try:\n    {reach}\nexcept OSError:\n    pass\nelse:\n    raise SystemExit('reached')\n"
        assert run_code(program, test)[0].reward == 1.0
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
        assert run_code(f"import socket\n{reach}", "", network="open")[0].reward == 1.0  # the same with a network
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(mark)!r}, 'a').write('x')\n    time.sleep(0.01)"
    start = f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    assert run_code(start, f"while not os.path.exists({str(mark)!r}): pass")[0].reward == 1.0
    size = mark.stat().st_size
    time.sleep(0.2)
    assert mark.stat().st_size == size


@needs_isolation
def test_faults_of_the_row_are_no_verdict_on_the_program() -> None:
    for tests, text in {
        "assert (": "a test of the row is not Python",
        (): "the row has an empty list of tests",
        (3,): "a test must be Python code or",
    }.items():
        scored, counts = run_code(GOOD, list(tests) if isinstance(tests, tuple) else tests)
        assert scored.reward is None
        assert text in scored.problems[0]
        assert counts == {"code/raised": 1, "unscored": 1}


def test_code_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(UserError, match="lets no process cut itself off from the network"):
        build_rewards([RewardSpec(verifier="code")])


def test_the_program_in_a_completion() -> None:
    assert program_of("a\n```py\nx=1\n```\n```\ny=2\n```\nb") == "y=2\n"
    assert program_of("x = 1") == "x = 1"

"""The verifier `code`: the completion's program must pass the row's tests, each in a process of its own.

What holds: nothing runs in the trainer's process. Each test gets a fresh `python -I` in an empty folder, with an empty
environment, a limit of wall time, CPU time and memory, and, through Linux namespaces (`unshare`, unprivileged), no
network, not even to this machine, no view of other processes and no signals to them. All that it started dies with it.

What does not hold, so run models that you do not trust in a container or a virtual machine:
- files: the program can read and change every file that this user can;
- memory is limited per process, and the number of processes is not: a fork bomb loads the machine until its time is up;
- the kernel: namespaces are no virtual machine, and where the machine's /proc cannot be hidden (some containers), the
  program can read what it says of this user's processes, their environment included;
- cheating: Python tests run in the program's own process, so a program that looks for it can make them pass. Tests of
  input and output cannot be fooled so: the expected output never enters the process;
- with `network: open` none of the namespaces are used: there is a network and a view of this user's processes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from po.rewards.cells import Call, Counted, failed, text_of
from po.rewards.verifiers import column

_CHILD = str(Path(__file__).with_name("code_child.py"))
_NAMESPACES = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_BEGUN, _START_SECONDS = b"started\n", 60.0
_OUTPUT = 1 << 20  # bytes of a program's output that are compared
_FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Code:
    """1 where all tests of the row pass, else 0; with `partial`, the share that passes.

    The program is the last fenced block of the completion, else all of it. The row's tests are Python code that raises
    where the program is wrong (a string or a list of them), or a list of {"input", "output"} (stdin and stdout; white
    space at line ends does not count). Running out of time or memory is a verdict, 0, and counted.
    """

    column: str = "tests"
    time_limit: Annotated[float, Gt(0)] = 5.0  # seconds of a test
    memory_mb: Annotated[int, Ge(64)] = 512  # of a process of the program
    processes: Annotated[int, Ge(1), Le(64)] = 2  # programs at a time
    partial: bool = False
    network: Literal["none", "open"] = "none"  # open: run where the machine has no namespaces; see what is lost
    rows = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The tests."""
        return (self.column,)

    def load(self) -> None:
        """Raise OSError where the network cannot be cut off."""
        if self.network == "none" and isolation() is None:
            raise OSError(
                "this machine lets no process cut itself off from the network (unshare, unprivileged user namespaces). "
                "Allow it, run elsewhere, or set options.network: open after reading docs/rewards.md"
            )

    def patience(self, seconds: float) -> float:
        """It keeps the time itself, test by test."""
        return seconds + self.time_limit + 10

    def answers(self, call: Call) -> Iterator[Counted]:
        """All of them, some at a time."""
        until = time.monotonic() + call.seconds
        events: list[str] = []  # appended to by several threads
        rows = [{k: v[i] for k, v in call.columns.items()} for i in range(len(call))]
        with ThreadPoolExecutor(self.processes) as pool:
            found = list(pool.map(lambda c, r: self._verdict(text_of(c), r, until, events), call.completions, rows))
        yield Counted(found, Counter(events))

    def _verdict(self, text: str, row: dict[str, Any], until: float, events: list[str]) -> Any:
        try:
            said = column(row, self.column)
            if said is None:
                return None
            tests, program = _tests(said), program_of(text)
            passed = 0
            for test in tests:
                if time.monotonic() > until:
                    raise TimeoutError("the time of a call was up before all tests had run")
                passes = self._passes(program, test, events)
                passed += passes
                if not (passes or self.partial):
                    break
            return passed / len(tests) if self.partial else float(passed == len(tests))
        except Exception as e:  # noqa: BLE001 - one completion must not cost the others their reward
            return failed(e)

    def _passes(self, program: str, test: str | tuple[str, str], events: list[str]) -> bool:
        stdin, source = (test[0], None) if isinstance(test, tuple) else ("", test)
        secret = secrets.token_hex(16)
        job = {"program": program, "test": source, "stdin": stdin, "secret": secret, "memory_mb": self.memory_mb}
        done, output, event = _run(job | {"seconds": self.time_limit}, self.time_limit, self.network)
        events += [event] if event else []
        return done == secret and (source is not None or _lines(output) == _lines(test[1]))


def program_of(text: str) -> str:
    """The last fenced block, else all of the text."""
    blocks = _FENCED.findall(text)
    return str(blocks[-1]) if blocks else text


def _tests(said: Any) -> list[str | tuple[str, str]]:
    """The row's tests. ValueError where they are not tests, or not Python: that is no fault of the program."""
    tests: list[str | tuple[str, str]] = []
    for one in said if isinstance(said, Sequence) and not isinstance(said, str) else [said]:
        if isinstance(one, str):
            try:
                ast.parse(one)
            except SyntaxError as e:
                raise ValueError(f"a test of the row is not Python: {e}") from e
            tests.append(one)
        elif isinstance(one, dict) and isinstance(one.get("output"), str):
            tests.append((str(one.get("input") or ""), one["output"]))
        else:
            raise ValueError('a test must be Python code or {"input": text, "output": text}')
    if not tests:
        raise ValueError("the row has an empty list of tests")
    return tests


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@cache
def isolation() -> tuple[str, ...] | None:
    """The command that cuts a process off, as far as this machine allows; None where not even from the network."""
    if shutil.which("unshare") is None:
        return None
    for command in (("unshare", *_NAMESPACES, "--mount-proc"), ("unshare", *_NAMESPACES)):
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return None


def _run(job: dict[str, Any], seconds: float, network: str) -> tuple[str, str, str]:
    """What the child reported at its end, its output, and 'program_timeout', 'program_memory' or ''.

    OSError where the program was not even reached: that is no verdict on it.
    """
    prefix = (isolation() or ()) if network == "none" else ()
    ours, theirs = os.pipe()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as out:
        said.write(json.dumps(job | {"report": theirs}).encode())
        said.seek(0)
        try:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-I", "-B", _CHILD],
                cwd=folder,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                stdin=said,
                stdout=out,
                stderr=out,
                pass_fds=[theirs],
                start_new_session=True,
            )
            os.close(theirs)
            begun, late, done = _watch(process, ours, seconds)
        finally:
            os.close(ours)
        out.seek(0)
        output = out.read(_OUTPUT).decode(errors="replace")
    if not begun:
        raise OSError(f"the program's process did not start: {output.strip()[-200:]}")
    late = late or process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
    return done, output, "program_timeout" if late else "program_memory" if "MemoryError" in output[-200:] else ""


def _watch(process: subprocess.Popen[bytes], report: int, seconds: float) -> tuple[bool, bool, str]:
    """Whether the program was begun, whether it was late, what was reported after that. The process has ended."""
    late, begun = False, False
    try:
        if select.select([report], [], [], _START_SECONDS)[0]:
            begun = os.read(report, len(_BEGUN)) == _BEGUN
            process.wait(seconds if begun else _START_SECONDS)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    os.set_blocking(report, False)  # what the program started may still hold the other end
    try:
        return begun, late, os.read(report, 4096).decode(errors="replace")
    except BlockingIOError:
        return begun, late, ""

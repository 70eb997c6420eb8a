"""A reward in a process of its own: the one way to stop Python code that hangs.

A thread cannot be stopped, and an alarm does not interrupt C code. So reward functions, verifiers and endpoints run in
a fresh Python process each (not a fork: no threads, locks or GPU state come along), started once and kept. Where an
answer does not come in time, the process and all that it started are killed, and the next call starts another; what
the function kept in memory is then lost. The process ends with its parent, however that ends.

What runs there shares nothing with the trainer but the arguments and sees the same sys.path, working folder and
environment. It imports no torch unless the function does.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from po.rewards.cells import Call, Cell, Counted, Failure, cells, failed

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from po.rewards.worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_START_SECONDS = 120.0  # a function's module may import torch


class Target(Protocol):
    """What a worker runs; it is pickled into the process."""

    def load(self) -> None:
        """Whatever must be imported or read; an exception here means that the reward cannot work."""
        ...

    def patience(self, seconds: float) -> float:
        """How long an answer may take, for a call of so many seconds; with `rows`, the answer for one completion."""
        ...

    @property
    def rows(self) -> bool:
        """Whether it answers completion by completion, so that one that hangs costs no other its reward."""
        ...

    def answers(self, call: Call) -> Iterator[Any]:
        """With `rows` one value at a time, else one list of all."""
        ...


class Worker:
    """Calls a target in its process. Not for several threads at once."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pipe: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def start(self) -> Failure | None:
        """Start the process and load the target; says why it cannot be loaded."""
        if self._pipe is not None:
            return None
        mine, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._pipe, self._process = Connection(mine.detach()), process
        self._end = weakref.finalize(self, _kill, process, self._pipe)
        answer = self._exchange(self._target, _START_SECONDS)
        failure = answer if isinstance(answer, Failure) else answer[0]
        if failure is not None:
            self.close()
        return failure

    def __call__(self, call: Call) -> tuple[list[Cell], Counter[str]]:
        """A cell for each completion, and what was counted on the way."""
        found: list[Cell] = []
        counts: Counter[str] = Counter()
        until = time.monotonic() + call.seconds
        while len(found) < len(call):
            left = until - time.monotonic()
            if left <= 0:
                late = Failure("timeout", f"was not reached within the {call.seconds:g} s of a call")
                found += [late] * (len(call) - len(found))
            else:
                self._run(call.part(len(found)), found, counts, left)
        return found, counts

    def _run(self, call: Call, found: list[Cell], counts: Counter[str], left: float) -> None:
        """Append the cells of a call, up to and including those of a first answer that did not come."""
        step, until, end = 1 if self._target.rows else len(call), time.monotonic() + left, len(found) + len(call)
        failure = self.start()
        if failure is not None:
            found += [failure] * len(call)
            return
        message: Any = call
        while len(found) < end:
            patience = self._target.patience(call.seconds)
            if self._target.rows:
                patience = min(patience, max(until - time.monotonic(), 0.001))
            answer = self._exchange(message, patience)
            if isinstance(answer, Failure):
                found += [answer] * step
                return
            found += answer[0]
            counts.update(answer[1])
            message = None

    def _exchange(self, message: Any, seconds: float) -> Any:
        """Send a message (None: nothing) and wait for an answer. After a failure the process is gone."""
        assert self._pipe is not None
        try:
            if message is not None:
                self._pipe.send_bytes(pickle.dumps(message))
            if self._pipe.poll(seconds):
                return pickle.loads(self._pipe.recv_bytes())
            self.close()
            return Failure("timeout", f"gave no answer in {seconds:.3g} s; its process was ended")
        except (EOFError, OSError):
            code = self._exit_code()
            self.close()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Failure("died", f"its process ended by itself ({how})")
        except BaseException:
            self.close()  # an answer may still be on its way, and it must not be taken for that of the next call
            raise

    def _exit_code(self) -> int:
        """Of a process whose end of the pipe is closed."""
        assert self._process is not None
        try:
            return self._process.wait(5)
        except subprocess.TimeoutExpired:  # it closed the pipe and went on
            return 0

    def close(self) -> None:
        """End the process."""
        end, self._end, self._pipe, self._process = self._end, None, None, None
        if end is not None:
            end()


def _kill(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what the function started
    process.wait()


def serve(fd: int, parent: int) -> None:
    """The other side: runs in the process until the pipe closes."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(fd)
    try:
        target: Target = pickle.loads(pipe.recv_bytes())
        pipe.send_bytes(pickle.dumps((_loaded(target), None)))
        while True:
            call = pickle.loads(pipe.recv_bytes())
            for answer in _answers(target, call):
                pipe.send_bytes(pickle.dumps(answer))
    except (EOFError, ConnectionError):
        os._exit(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _loaded(target: Target) -> Failure | None:
    try:
        target.load()
    except (Exception, SystemExit) as e:  # noqa: BLE001 - whatever a user's module does
        return failed(e)
    return None


def _answers(target: Target, call: Call) -> Iterator[tuple[list[Cell], Counter[str]]]:
    """Answers as cells. A target with rows catches what a row raises itself."""
    try:
        for answer in target.answers(call):
            values = [answer] if target.rows else answer
            counts = answer.counts if isinstance(answer, Counted) else Counter()
            yield cells(values, 1 if target.rows else len(call)), counts
    except (Exception, SystemExit) as e:  # noqa: BLE001 - whatever a user's function does
        yield [failed(e)] * len(call), Counter()

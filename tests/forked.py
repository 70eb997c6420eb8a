"""Processes for tests that kill them or need several ranks: forked from one that has everything imported.

Starting an interpreter with torch and transformers costs seconds; multiprocessing's forkserver pays them once. Every
process leads a process group of its own and writes stdout and stderr to one log.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["po.run", "po.cli", "po.recipe", "po.trackers", "deepspeed"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_env(world: int) -> list[dict[str, str]]:
    """What a launcher tells its ranks."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def _child(target: Callable[..., Any], args: tuple[Any, ...], log: str, env: Mapping[str, str]) -> None:
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ |= env
    sys.exit(target(*args))


class Job:
    """target(*args) in one process, or in `world` of them with a launcher's variables. The target is a function of a
    module; what it returns is the exit code."""

    def __init__(
        self,
        log: Path,
        target: Callable[..., Any],
        *args: Any,
        world: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.log = log
        variables = [dict(env or {}) | e for e in (rank_env(world) if world else [{}])]
        self.ranks = [_SERVER.Process(target=_child, args=(target, args, str(log), v)) for v in variables]
        for p in self.ranks:
            p.start()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes; None where it had to be ended."""
        deadline = time.monotonic() + seconds
        for p in self.ranks:
            p.join(max(deadline - time.monotonic(), 0))
        codes = [p.exitcode for p in self.ranks]
        self.kill()
        return codes

    def kill(self) -> None:
        """kill -9 for whatever is left, its children too."""
        for p in self.ranks:
            if p.pid is not None and p.exitcode is None:
                try:
                    os.killpg(p.pid, signal.SIGKILL)
                except ProcessLookupError:
                    p.kill()
            p.join(10)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

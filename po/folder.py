"""The run folder: one run at a time may write it, and it says what made it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from po.checkpoint import checkpoints
from po.errors import UserError

# Beside checkpoints: what a second run would spoil.
_TRACES = ("metrics.jsonl", "adapter_config.json", "config.json", "rollouts")
_PACKAGES = (
    *("po", "torch", "transformers", "peft", "datasets", "accelerate", "deepspeed", "safetensors", "tokenizers"),
    *("numpy", "bitsandbytes", "wandb", "trl"),
)
_VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|DS|DEEPSPEED|HF|TRANSFORMERS|TOKENIZERS|ACCELERATE|WANDB|SLURM|PO)_\w+"
    r"|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
)
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth(?!or)|cookie", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|AKIA[A-Z0-9]{16})\b|(?<=://)[^/\s@]+(?=@)"
)
_HIDDEN = "[redacted]"


def redact(value: Any, name: str = "") -> Any:
    """The same value with secrets replaced by '[redacted]': strings under names like key, token, password, and what
    looks like one (hub, OpenAI, GitHub and AWS keys; user:password in an address). Descends into
    mappings and sequences."""
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, name) for v in value]
    if not isinstance(value, str):
        return value
    hide = value and _SECRET_NAME.search(name) and not re.search(r"tokeniz|tokens", name, re.IGNORECASE)
    return _HIDDEN if hide else _SECRET_TEXT.sub(_HIDDEN, value)


def environment() -> dict[str, Any]:
    """What the run runs on, for environment.json: versions, code, hardware, command, relevant variables, no secrets."""
    command = [re.sub(r"(?i)(key|token|secret|password)=.*", rf"\1={_HIDDEN}", a) for a in [sys.executable, *sys.argv]]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redact(shlex.join(command)),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "code": _commit(Path(__file__).parent),
        "hardware": _hardware(),
        "variables": redact({k: v for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)}),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout that `folder` is tracked in, None where it is an installed package."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


class RunLock:
    """The right to write a run folder, held by rank 0 until the process ends, however it ends.

    UserError where another living run holds it, or where the folder already has a run and `resume` is off.
    """

    def __init__(self, run_dir: Path, resume: bool) -> None:
        self._fd: int | None = None
        if int(os.environ.get("RANK", "0")) != 0:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        os.register_at_fork(after_in_child=self.release)  # a data worker must not keep the lock of a dead run
        self._take(run_dir)
        traces = [p.name for p in checkpoints(run_dir)] + [t for t in _TRACES if (run_dir / t).exists()]
        if traces and not resume:
            self.release()
            raise UserError(
                f"output_dir: {run_dir} already has a run (it holds {traces[0]}) and resume is off. Set resume=true to "
                "continue it, or set another output_dir."
            )
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}, started {started}".encode(), 0)

    def _take(self, run_dir: Path) -> None:
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 1000, 0).decode(errors="replace")
            self.release()
            raise UserError(
                f"output_dir: another run is writing {run_dir} ({holder}). Wait for it or stop it, or set another "
                "output_dir."
            ) from None
        except OSError as e:
            sys.stderr.write(
                f"{run_dir}: this file system has no locks ({e}), so nothing keeps a second run out of it.\n"
            )

    def release(self) -> None:
        """Let the folder go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

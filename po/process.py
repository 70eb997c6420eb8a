"""This process among the others of a run: what it prints, and the groups it joins."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import warnings
from datetime import timedelta
from typing import Any

import transformers

from po.recipe import training_arguments
from po.spec import Recipe


def say(text: str) -> None:
    """One line for people, from rank 0 alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def quiet() -> None:
    """Keep what users cannot act on off the terminal: loading bars, and libraries' notes on their own next versions."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|transformers|peft|deepspeed")


def keep_freed_memory() -> None:
    """Let freed memory stay with this process instead of going back to the kernel, where the C library is glibc.

    For training on a CPU: the large tensors of a step are otherwise fresh pages each time, which the kernel has to
    zero first (a fifth of the step for a small model with a large vocabulary).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        never_map, never_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        mallopt(*never_map)
        mallopt(*never_trim)


def arguments(recipe: Recipe) -> Any:
    """TrainingArguments; makes the process groups, and switches ZeRO-3's partitioned loading on."""
    if recipe.deepspeed is None:
        return training_arguments(recipe)
    import deepspeed

    if "RANK" not in os.environ:  # DeepSpeed wants a group also where no launcher made one
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)
    args = training_arguments(recipe)
    backend = "gloo" if args.device.type == "cpu" else None
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timedelta(seconds=args.ddp_timeout))
    return args

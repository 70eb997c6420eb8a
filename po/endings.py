"""How a command ends: every exception that is meant for the user becomes a message and an exit code, here only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from po.errors import OutOfMemoryError, POError, UserError, out_of_memory

_ADVICE = """What to change, cheapest first:
  1. train.per_device_train_batch_size: half, and train.gradient_accumulation_steps: double (the same objective)
  2. train.activation_checkpointing: true
  3. data.max_length: lower (rows above it are handled by data.overlong, and counted)
  4. lora: {r: 16} instead of all weights; reference.kind: cached or adapter_off instead of frozen
  5. deepspeed: zero2, zero3, zero2_offload or zero3_offload"""


def ending(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code. What is nobody's mistake but ours keeps its traceback.

    With several ranks, a mistake in the recipe is explained by rank 0 alone. PO_DEBUG=1 shows every traceback.
    """
    code = 0
    try:
        try:
            command()
        except SystemExit as e:  # argparse, or a run that was asked to stop
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        sys.stdout.flush()
    except POError as e:
        return _explain(e)
    except KeyboardInterrupt:
        _say("po: interrupted")
        return 130
    except BrokenPipeError:  # `po heads | head -1`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        return _explain(OutOfMemoryError(f"out of memory: {_first_line(e)}").with_traceback(e.__traceback__))
    return code


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def rank() -> int:
    """This process's number among those of the launcher; 0 where there is none."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def _explain(error: POError) -> int:
    if os.environ.get("PO_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    elif rank() == 0 or isinstance(error, OutOfMemoryError):
        _say(f"po: {error}\n{_ADVICE}" if isinstance(error, OutOfMemoryError) else f"po: {error}")
    elif isinstance(error, UserError):
        _say(f"po: rank {rank()} stops for the reason that rank 0 gives")
    else:
        _say(f"po: rank {rank()}: {error}")
    return error.exit_code

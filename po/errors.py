"""What a run can end with. The exit codes are part of the command line's contract (`po --help` prints them)."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import ClassVar


class POError(Exception):
    """An end of the run that is explained to the user in one message, without a traceback."""

    exit_code: ClassVar[int] = 1


class UserError(POError, ValueError):
    """The recipe or the data is wrong. The message says where, what was found, what was expected and what to do."""

    exit_code = 2


class OutOfMemoryError(POError):
    """The machine's memory is too small for a batch. The message names the batch and the cheapest change that fits."""

    exit_code = 3


class NumericsError(POError):
    """A loss or gradient is NaN or Inf, or a check of the numbers (reference, packing) failed."""

    exit_code = 4


class StoppedError(POError):
    """The run was asked to stop, saved, and can be resumed."""

    exit_code = 75  # sysexits' EX_TEMPFAIL


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device's or the host's memory was too small."""
    torch = sys.modules.get("torch")  # not imported for this: `po --help` needs no torch
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator: can't allocate memory" in text or "CUDA error: out of memory" in text


def suggest(word: str, known: Iterable[object]) -> str:
    """' Did you mean 'beta'?' for the nearest of the known words, or '' when none is near."""
    near = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

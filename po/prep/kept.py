"""A check while it is being made, kept beside what it will write, so that a kill undoes little of it.

The whole state is small against the rows, and is written anew each time: as often as costs a twentieth of the time.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from po.errors import UserError
from po.prep.check import Check
from po.prep.partial import beside, check_same

_LEAST = 1.0  # seconds from one time to the next
_SHARE = 20  # so many times as long as it took
_KNOWN = {
    *(("po.prep.check", name) for name in ("Check", "Moments")),
    *(("collections", "Counter"), ("array", "array"), ("array", "_array_reconstructor"), ("builtins", "bytearray")),
}


class Kept:
    """The state of a check in a file."""

    def __init__(self, target: Path, asked: Mapping[str, Any], force: bool) -> None:
        """target: what will be written at last. asked: what decides what is found; another one is refused."""
        if not target.absolute().parent.is_dir():
            raise UserError(f"{target}: there is no folder {target.parent}; create it first")
        self.target, self.asked, self.force = target, asked, force
        self.path = beside(target, ".check.partial")
        self.due = time.monotonic() + _LEAST

    def load(self) -> Check | None:
        """The check as far as it got, where there is one."""
        if self.force or not self.path.exists():
            return None
        with open(self.path, "rb") as f:
            check_same(self.target, json.loads(f.readline()), self.asked)
            try:
                found = _Reader(f).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError) as e:
                raise UserError(f"{self.path}: cannot be read ({e}); remove it, or give --force, to begin anew") from e
        return found if isinstance(found, Check) else None

    def save(self, check: Check, last: bool = False) -> None:
        """Write it, where it is time to."""
        started = time.monotonic()
        if started < self.due and not last:
            return
        new = beside(self.path, ".new")
        with open(new, "wb") as f:
            f.write(json.dumps(self.asked).encode() + b"\n")
            pickle.dump(check, f, protocol=5)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, self.path)
        now = time.monotonic()
        self.due = now + max(_LEAST, _SHARE * (now - started))

    def done(self) -> None:
        """All is written: take the file away."""
        self.path.unlink(missing_ok=True)


class _Reader(pickle.Unpickler):
    """Makes nothing but what a Check is made of."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for anything else."""
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"holds a {module}.{name}")

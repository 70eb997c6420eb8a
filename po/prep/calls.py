"""The journal of paid requests, `OUTPUT.calls.jsonl`: what was answered, its tokens and its cost.

Append-only. A request that was answered before a kill is read from it instead of being paid again. It is the ledger of
an output, and outlives it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from po.errors import UserError


class Journal:
    """Lines by key; in memory are keys and places only. `path` None: nothing is kept.

    Opened at the first use: by then run_step keeps other processes from the output. A line that a kill tore is cut off.
    read_only: a dry run reads what is there and writes nothing.
    """

    def __init__(self, path: Path | None, read_only: bool = False) -> None:
        self.path, self._read_only = path, read_only
        self._file: IO[bytes] | None = None
        self._places: dict[str, int] = {}

    def __getitem__(self, key: str) -> dict[str, Any] | None:
        """The line of a key, None where there is none."""
        file = self._opened()
        if file is None or key not in self._places:
            return None
        file.seek(self._places[key])
        line: dict[str, Any] = json.loads(file.readline())
        return line

    def add(self, key: str, line: Mapping[str, Any]) -> None:
        """Keep a line. It survives the process from here on; `sync` makes it survive the machine."""
        file = self._opened()
        if file is None or self._read_only:
            return
        self._places[key] = file.seek(0, os.SEEK_END)
        file.write(json.dumps({"key": key, **line}).encode() + b"\n")
        file.flush()

    def sync(self) -> None:
        """On the disk."""
        if self._file is not None and not self._read_only:
            os.fsync(self._file.fileno())

    def _opened(self) -> IO[bytes] | None:
        if self._file is None and self.path is not None:
            if self._read_only and not self.path.exists():
                return None
            self._file = self.path.open("rb" if self._read_only else "ab+")
            self._find(self._file)
        return self._file

    def _find(self, file: IO[bytes]) -> None:
        if not self._read_only:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is writing it. Wait for it") from None
        file.seek(0)
        at = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                self._places[str(json.loads(line)["key"])] = at
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}: byte {at}: expected a line that a run of data_prep wrote, got {line[:40]!r}. Remove "
                    "that line, or the file if its answers need not be kept"
                ) from None
            at += len(line)
        else:
            return
        if not self._read_only:
            file.truncate(at)

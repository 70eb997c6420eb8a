"""What has been sampled, on disk: one JSON line a group, written before it is trained on, read again after a kill.

The lines are rows that `data.train` reads: prompt, responses with token ids, log-probs and rewards, and the fields of
the row that the prompt came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from po.errors import UserError

Key = tuple[int, int]  # round, place in the round
Line = Mapping[str, Any]


class Journal:
    """A rank's file. A line that a kill cut off is removed when the file is opened; nothing else ever is."""

    def __init__(self, folder: Path, rank: int, meta: Mapping[str, Any]) -> None:
        """meta: what decides the samples. Raises UserError where the folder holds samples made under another one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.jsonl"
        _check_meta(folder / f"rank{rank}.meta.json", self.path, meta)
        self._at: dict[Key, int] = {}
        self.path.touch()
        with open(self.path, "r+b") as file:
            end = 0
            for raw in file:
                if not raw.endswith(b"\n"):
                    file.truncate(end)
                    break
                row = json.loads(raw)
                self._at[row["round"], row["place"]] = end
                end += len(raw)

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)

    def read(self, key: Key) -> Line:
        """The group sampled at this place."""
        with open(self.path, "rb") as file:
            file.seek(self._at[key])
            row: Line = json.loads(file.readline())
        return row

    def write(self, rows: Sequence[Line]) -> None:
        """Append groups; they are on the disk when this returns. OSError where it is full."""
        with open(self.path, "ab") as file:
            for row in rows:
                assert (row["round"], row["place"]) not in self._at, "sampled twice"
                self._at[row["round"], row["place"]] = file.tell()
                file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _check_meta(path: Path, journal: Path, meta: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(meta)))
    if journal.is_file() and journal.stat().st_size and path.is_file():
        then = json.loads(path.read_text("utf-8"))
        changed = [f"  {k}: sampled with {then.get(k)!r}, now {v!r}" for k, v in now.items() if then.get(k) != v]
        if changed:
            raise UserError(
                f"{journal}: holds samples of a run that differs from this one:\n" + "\n".join(changed) + "\nPut these "
                "back to go on with them, or start a new run in another output_dir."
            )
    staged = path.with_suffix(".tmp")  # a kill leaves the one before or this one
    staged.write_text(json.dumps(now, indent=2) + "\n", "utf-8")
    staged.replace(path)

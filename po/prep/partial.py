"""An output while it is being written: lines that survive a kill, and how far they go.

`OUTPUT.partial` holds JSON lines; `OUTPUT.progress.json` says how many input rows and bytes of it are whole. What lies
behind those bytes is cut off when the step is resumed, and done again. At the end the lines become the output (as
they are, zipped, or as Parquet), which takes its name in one step.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from po.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 2048


def beside(output: Path, ending: str) -> Path:
    """A file next to the output that belongs to it."""
    return output.with_name(output.name + ending)


def check_output(output: Path) -> None:
    """Raises UserError where the output cannot be what its name says, or lie where it should."""
    if not output.name.endswith(ENDINGS):
        raise UserError(f"{output}: expected an output that ends in {', '.join(ENDINGS)}")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}; create it first")


def check_same(output: Path, was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises UserError where what was begun is not what is asked for now."""
    now = json.loads(json.dumps(asked))
    differing = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if differing:
        said = "; ".join(f"{k}: was {_short(was.get(k))}, is {_short(now.get(k))}" for k in differing)
        raise UserError(
            f"{output}: a part of it was written by a different command ({said}). Give the same command to "
            "go on, --force to begin anew, or another output"
        )


class Partial:
    """The lines of an output, in the order of the input."""

    def __init__(self, output: Path, asked: Mapping[str, Any], force: bool) -> None:
        """asked: what decides the bytes. A partial output that was asked otherwise is refused."""
        check_output(output)
        self.output, self.asked = output, asked
        self.path, self.progress = beside(output, ".partial"), beside(output, ".progress.json")
        if output.exists() and not force:
            raise UserError(f"{output} exists; name another output, or overwrite it with --force")
        self.file: IO[bytes] = open(self.path, "ab+")  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{output}: another process is writing it. Wait for it, or name another output") from None
        try:
            self.state = {} if force else self._found()
        except UserError:
            self.file.close()
            raise
        self.file.truncate(self.state.get("bytes", 0))
        self.bytes: int = self.state.get("bytes", 0)

    @property
    def position(self) -> int:
        """How many input rows are done."""
        return int(self.state.get("position", 0))

    def _found(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self.progress.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        if self.path.stat().st_size < state["bytes"]:  # the output was finished, or the partial file removed
            return {}
        check_same(self.output, state["asked"], self.asked)
        return state

    def write(self, lines: bytes) -> None:
        """Append whole lines."""
        self.file.write(lines)
        self.bytes += len(lines)

    def commit(self, position: int, tally: Mapping[str, Any]) -> None:
        """What was written so far is whole and stands for so many input rows."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.state = {"asked": self.asked, "position": position, "bytes": self.bytes, "tally": tally}
        new = beside(self.progress, ".new")
        with open(new, "w", encoding="utf-8") as f:
            json.dump(self.state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, self.progress)

    def render(self) -> Path:
        """The output under a name of its own: whole, but not yet in its place."""
        if self.output.name.endswith(".jsonl"):
            return self.path
        new = beside(self.output, ".new")
        if self.output.name.endswith(".gz"):
            with open(self.path, "rb") as lines, open(new, "wb") as f, gzip.GzipFile("", "wb", 6, f, mtime=0) as zipped:
                shutil.copyfileobj(lines, zipped, 1 << 20)
        else:
            write_parquet(self.path, new, self.output)
        return new

    def place(self, rendered: Path) -> None:
        """Give the output its name and take the working files away."""
        os.replace(rendered, self.output)
        self.path.unlink(missing_ok=True)
        self.progress.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the files go."""
        self.file.close()


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def sha256(path: Path) -> str:
    """The hash that sha256sum prints."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_parquet(lines: Path, new: Path, output: Path) -> None:
    """JSON lines as Parquet, a row group at a time, under a schema that fits all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.schema([])
        for rows in _batches(lines):
            found = pa.Table.from_pylist(rows).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with pq.ParquetWriter(new, schema) as writer:
            for rows in _batches(lines):
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    except (pa.ArrowException, TypeError, OverflowError) as e:
        raise UserError(
            f"{output}: these rows do not fit the columns of a Parquet file ({e}). All of it is in {lines}; name an "
            "output that ends in .jsonl"
        ) from e


def _batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    keys: dict[str, None] = {}
    with open(lines, "rb") as f:
        while batch := [json.loads(line) for line in islice(f, _PARQUET_ROWS)]:
            for row in batch:
                keys.update(dict.fromkeys(row))
            yield [dict.fromkeys(keys) | row for row in batch]

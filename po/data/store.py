"""Examples on disk: one Arrow file, memory-mapped, read row by row; sealed with the sizes and hashes of its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from po.data.rows import Example

EXAMPLES, REPORT, SEAL = "examples.arrow", "report.json", "seal.json"
_BATCH = 512
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("where", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("reward", pa.list_(pa.float64())),
        ("label", pa.list_(pa.int8())),
        ("logps", pa.list_(pa.list_(pa.float64()))),
        ("chosen_first", pa.bool_()),
        ("columns", pa.map_(pa.string(), pa.float64())),
        ("embedding", pa.list_(pa.list_(pa.float32()))),
        ("prompt_embedding", pa.list_(pa.float32())),
        ("teacher_ids", pa.list_(pa.list_(pa.list_(pa.int32())))),
        ("teacher_logps", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("teacher_ref_logps", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("ended", pa.list_(pa.bool_())),
        ("record", pa.string()),
        ("privileged_ids", pa.list_(pa.int32())),
        ("response_columns", pa.map_(pa.string(), pa.list_(pa.float64()))),
        ("token_columns", pa.map_(pa.string(), pa.list_(pa.list_(pa.float64())))),
    ]
)
_HEAVY = ("embedding", "prompt_embedding", "teacher_ids", "teacher_logps", "teacher_ref_logps", "record")
assert _SCHEMA.names == [f.name for f in fields(Example)]


class Examples(Sequence[Example]):
    """A sequence of Example in an Arrow file. In memory is only the row that is asked for; pickles as its path."""

    def __init__(self, path: str | Path, light: bool = False) -> None:
        self.path, self._light = str(path), light
        self._open()

    def _open(self) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(self.path))
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._ends = list(accumulate(b.num_rows for b in self._batches))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "light": self._light}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def light(self) -> Examples:
        """The same examples with () for embeddings, teachers and records that are there, to look through all rows."""
        return Examples(self.path, True)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        """Example i, or a list for a slice. Raises IndexError beyond the end."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        at = i + len(self) if i < 0 else i
        if not 0 <= at < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        b = bisect(self._ends, at)
        return _examples(self._batches[b].slice(at - self._ends[b] + self._batches[b].num_rows, 1), self._light)[0]

    def __iter__(self) -> Iterator[Example]:
        for batch in self._batches:
            yield from _examples(batch, self._light)


def light(examples: Sequence[Example]) -> Sequence[Example]:
    """What `Examples.light` gives; of other sequences themselves."""
    return examples.light() if isinstance(examples, Examples) else examples


def _examples(batch: pa.RecordBatch, light: bool) -> list[Example]:
    columns = []
    for name, column in zip(batch.schema.names, batch.columns):
        if light and name in _HEAVY:
            nothing = "" if pa.types.is_string(column.type) else ()
            columns.append([nothing if there else None for there in column.is_valid().to_pylist()])
        else:
            columns.append(column.to_pylist())
    return [Example(*map(_frozen, row)) for row in zip(*columns)]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def write(path: Path, examples: Iterable[Example]) -> int:
    """Stream examples into an Arrow file; returns how many there were."""
    count, examples = 0, iter(examples)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while chunk := list(islice(examples, _BATCH)):
            columns = zip(*(tuple(getattr(e, name) for name in _SCHEMA.names) for e in chunk))
            writer.write_batch(
                pa.record_batch([pa.array(c, t) for c, t in zip(columns, _SCHEMA.types)], schema=_SCHEMA)
            )
            count += len(chunk)
    return count


def publish(folder: Path, target: Path) -> None:
    """Seal a folder and move it to its place in one step. Where another process was faster, its result stays."""
    sizes = {name: [(folder / name).stat().st_size, _sha256(folder / name)] for name in (EXAMPLES, REPORT)}
    (folder / SEAL).write_text(json.dumps(sizes))
    for name in (EXAMPLES, REPORT, SEAL):
        with open(folder / name, "rb") as f:
            os.fsync(f.fileno())
    try:
        os.rename(folder, target)
    except OSError:  # the target exists and is not empty: another process published first
        if not sound(target):
            raise
        shutil.rmtree(folder)


def sound(folder: Path) -> bool:
    """Whether a cache folder is complete and unchanged: every sealed file has its size and its SHA-256."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        return set(seal) == {EXAMPLES, REPORT} and all(
            (folder / name).stat().st_size == size and _sha256(folder / name) == sha
            for name, (size, sha) in seal.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def workspace(parent: Path) -> Path:
    """A new folder to build in, on the same file system as its target."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".building-", dir=parent))


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

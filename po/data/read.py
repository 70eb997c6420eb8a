"""Records out of files and datasets, each with the place it came from. Nothing is interpreted here."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from po.data.report import Problem, describe
from po.errors import UserError

_BOM = b"\xef\xbb\xbf"
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Record:
    """One record of a source, or why there is none at this place."""

    where: str  # "train.jsonl:412", "train.parquet:row 7"
    data: dict[str, Any] | None
    problem: Problem | None = None


def read_file(path: Path, name: str) -> Iterator[Record]:
    """The records of one file; what is broken comes as a Record with a problem. JSONL and Parquet are streamed."""
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path, name)
        elif path.name.endswith((".json", ".json.gz")) and _starts_as_array(path):
            yield from _array(path, name)
        else:
            yield from _lines(path, name)
    except PermissionError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e


def _unzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(".gz") else open(path, "rb")


def _starts_as_array(path: Path) -> bool:
    try:
        with _unzip(path) as f:
            return f.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["
    except _GZIP_ERRORS:
        return False  # the reader of lines says what is wrong


def _bad(where: str, expected: str, got: str) -> Record:
    return Record(where, None, Problem(where, "", expected, got))


def _lines(path: Path, name: str) -> Iterator[Record]:
    number = 0
    try:
        with _unzip(path) as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    yield _line(raw.removeprefix(_BOM) if number == 1 else raw, f"{name}:{number}")
    except _GZIP_ERRORS as e:
        yield _broken_gzip(f"{name}:{number + 1}", e)


def _broken_gzip(where: str, e: Exception) -> Record:
    got = "a truncated one" if isinstance(e, EOFError) else f"a damaged one ({e})"
    return _bad(where, "a whole gzip file", f"{got}; the rows from here on are lost")


def _line(raw: bytes, where: str) -> Record:
    try:
        return _record(json.loads(raw.rstrip().decode()), where)
    except UnicodeDecodeError as e:
        return _bad(where, "UTF-8", f"byte 0x{raw[e.start]:02x} at column {e.start + 1}")
    except json.JSONDecodeError as e:
        return _bad(where, "one JSON object per line", f"broken JSON: {e.msg} (column {e.colno})")
    except (RecursionError, ValueError) as e:  # nested too deeply; a number with thousands of digits
        return _bad(where, "one JSON object per line", f"JSON that Python refuses: {e}")


def _record(data: object, where: str) -> Record:
    return Record(where, data) if isinstance(data, dict) else _bad(where, "a JSON object", describe(data))


def _array(path: Path, name: str) -> Iterator[Record]:
    """A JSON array of records, one at a time, so that what stands before broken JSON is kept."""
    try:
        with _unzip(path) as f:
            text = f.read().removeprefix(_BOM).decode(errors="surrogateescape")
    except _GZIP_ERRORS as e:
        yield _broken_gzip(f"{name}:1", e)
        return
    newlines = [m.start() for m in re.finditer("\n", text)]
    decoder, at, opener = json.JSONDecoder(), _skip(text, 0), "["
    while text[at : at + 1] == opener:
        at = _skip(text, at + 1)
        if opener == "[" and text[at : at + 1] == "]":
            break
        where, start = f"{name}:{bisect(newlines, at) + 1}", at
        try:
            data, at = decoder.raw_decode(text, start)
        except (RecursionError, ValueError) as e:
            said = f"{e.msg} (line {e.lineno})" if isinstance(e, json.JSONDecodeError) else str(e)
            yield _bad(where, "a JSON object", f"broken JSON: {said}; the rows from here on are lost")
            return
        stray = re.search("[\udc80-\udcff]", text[start:at])
        yield _bad(where, "UTF-8", f"byte 0x{ord(stray[0]) - 0xDC00:02x}") if stray else _record(data, where)
        at, opener = _skip(text, at), ","
    if text[at : at + 1] != "]" or _skip(text, at + 1) != len(text):
        found = repr(text[at]) if at < len(text) else "the end of the file"
        yield _bad(f"{name}:{bisect(newlines, at) + 1}", "',' or a final ']' in an array of records", found)


def _skip(text: str, at: int) -> int:
    """The next position that is not white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for data in batch.to_pylist():
                    number += 1
                    yield Record(f"{name}:row {number}", _without_nulls(data))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        got = f"{type(e).__name__}: {str(e).splitlines()[0]}; the rows from here on are lost"
        yield _bad(f"{name}:row {number + 1}", "a whole Parquet file", got)


def read_dataset(dataset: Any, name: str) -> Iterator[Record]:
    """The records of a dataset of the `datasets` library."""
    for number, data in enumerate(dataset, 1):
        yield Record(f"{name}:row {number}", _without_nulls(data))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every nested object all keys that any of them has; take the ones it filled in away again."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value

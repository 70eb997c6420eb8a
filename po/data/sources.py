"""Where rows come from: files, patterns, `datasets` folders and the hub, found and fingerprinted before any is read."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from po.data.read import Record, read_dataset, read_file
from po.errors import UserError, suggest
from po.spec import Source

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_HUB = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class Opened:
    """A source that was found: files with the names messages give them, or a dataset of the `datasets` library."""

    source: Source
    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    dataset: Any = None

    def fingerprint(self) -> str:
        """Hash of the content and of the names that places are reported under."""
        sha = hashlib.sha256(json.dumps(self.names).encode())
        for file in self.files:
            sha.update(f"{file.stat().st_size} ".encode())
            with open(file, "rb") as f:
                for block in iter(lambda: f.read(1 << 20), b""):
                    sha.update(block)
        if self.dataset is not None:
            sha.update(str(self.dataset._fingerprint).encode())
        return sha.hexdigest()

    def records(self) -> Iterator[Record]:
        """The source's records in order, at most `limit` of them. Raises UserError where a file cannot be opened."""
        if self.dataset is not None:
            every: Iterable[Record] = read_dataset(self.dataset, self.names[0])
        else:
            every = (record for file, name in zip(self.files, self.names) for record in read_file(file, name))
        return islice(every, self.source.limit)


def open_sources(sources: Iterable[Source], split: str) -> list[Opened]:
    """Find every source. Files are called by their last part in messages, or by their path where two share it.

    Raises UserError for a path that does not exist, naming near ones, and for options that a source cannot honour.
    """
    opened = [_open_source(source, split) for source in sources]
    short = [file.name for one in opened for file in one.files]
    clash = {name for name in short if short.count(name) > 1}
    return [
        replace(one, names=tuple(str(f) if f.name in clash else f.name for f in one.files) or one.names)
        for one in opened
    ]


def _open_source(source: Source, split: str) -> Opened:
    if source.limit is not None and source.limit < 1:
        raise UserError(f"data.{split}: limit: expected a positive number of rows, got {source.limit}")
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _folder(source, path, split)
    if path.is_file():
        files = [path]
    elif any(c in source.path for c in "*?["):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise UserError(f"data.{split}: no file matches {source.path!r}")
    elif _may_be_hub(source.path, path):
        return _hub(source, path, split)
    else:
        raise UserError(_not_found(source, path, split))
    for file in files:
        if not file.name.endswith(ENDINGS):
            raise UserError(f"data.{split}: {file}: expected a file ending in {', '.join(ENDINGS)}")
    for option in ("split", "name"):
        if getattr(source, option) is not None:
            raise UserError(f"data.{split}: {source.path}: {option}: a file has none; remove it, or name a hub dataset")
    return Opened(source, tuple(files))


def _may_be_hub(written: str, path: Path) -> bool:
    inside = "/" in written and path.parent.is_dir()  # data/trian: a mistyped local path, not owner/name
    return bool(_HUB.match(written)) and not written.endswith(ENDINGS) and not inside


def _not_found(source: Source, path: Path, split: str) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"data.{split}: {source.path} not found: there is no folder {parent}"
    near = suggest(path.name, [p.name for p in parent.iterdir()])
    return f"data.{split}: {source.path} not found in {parent.resolve()}.{near}"


def _folder(source: Source, path: Path, split: str) -> Opened:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"data.{split}: {source.path} is a folder that `datasets` did not save (no state.json); for the files in "
            f"it write a pattern: {source.path.rstrip('/')}/*.jsonl"
        )
    if source.name is not None:
        raise UserError(f"data.{split}: {source.path}: name: a folder has none; remove it, or name a hub dataset")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"data.{split}: {source.path}: `datasets` cannot load this folder: {e}") from e
    return Opened(source, names=(path.name,), dataset=_split_of(loaded, source, split))


def _hub(source: Source, path: Path, split: str) -> Opened:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        near = suggest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(
            f"data.{split}: {source.path} is no local file or folder, and the hub gave no dataset of that name: "
            f"{type(e).__name__}: {e}.{near}"
        ) from e
    dataset = loaded if source.split is not None else _split_of(loaded, source, split)
    return Opened(source, names=(source.path,), dataset=dataset)


def _split_of(loaded: Any, source: Source, split: str) -> Any:
    if not isinstance(loaded, dict):
        if source.split is not None:
            raise UserError(f"data.{split}: {source.path}: split: this folder holds one split; remove {source.split!r}")
        return loaded
    if source.split in loaded:
        return loaded[source.split]
    if source.split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    got = "none" if source.split is None else repr(source.split)
    near = suggest(source.split, loaded) if source.split else ""
    raise UserError(f"data.{split}: {source.path}: split: expected one of {', '.join(loaded)}; got {got}.{near}")

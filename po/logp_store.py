"""Reference log-probs on disk: a folder of Parquet files, one row per response, written once and never changed.

    key     string          SHA-256 of the prompt's and the response's token ids (`response_key`)
    logps   list<float32>   log p(y_t | x, y_<t) in nats, raw, one per response token

The folder belongs to one set of weights, one dtype and one version of the code (`reference` names it so). A file's
name is `part-<SHA-256 of its bytes>.parquet`, so a truncated or altered one is recognised, set aside and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logps = NDArray[np.float32]  # (response tokens,)


def response_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """What a response's log-probs depend on beside the weights, as 64 hex digits."""
    prompt, response = np.asarray(prompt_ids, "<i8"), np.asarray(response_ids, "<i8")
    h = hashlib.sha256(len(prompt).to_bytes(8, "little"))
    h.update(prompt.tobytes())
    h.update(response.tobytes())
    return h.hexdigest()


class LogpStore:
    """The sound files of a folder, opened together. The log-probs lie in an unnamed temporary file that is mapped into
    memory, so that a process holds the keys and the operating system decides about the rest."""

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder = folder
        self.about = dict(about)  # whose log-probs these are, for a reader of the files; written into each
        self.bad: list[str] = []  # files found damaged and set aside
        self._span: dict[bytes, tuple[int, int]] = {}
        self._values: Logps = np.empty(0, np.float32)
        self.refresh()

    def __len__(self) -> int:
        return len(self._span)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._span

    def __getitem__(self, key: str) -> Logps:
        """The log-probs under a key; KeyError where it is not stored."""
        start, stop = self._span[bytes.fromhex(key)]
        return self._values[start:stop]

    def refresh(self) -> None:
        """Read the folder again, also what other processes have added. A damaged file is renamed to `*.damaged`."""
        self._span, at = {}, 0
        with tempfile.TemporaryFile() as f:
            for path in sorted(self.folder.glob("part-*.parquet")):
                table = self._read(path)
                if table is None:
                    continue
                logps = table["logps"].combine_chunks()
                ends = at + logps.offsets.to_numpy()
                for key, start, stop in zip(table["key"].to_pylist(), ends[:-1].tolist(), ends[1:].tolist()):
                    self._span[bytes.fromhex(key)] = (start, stop)
                f.write(logps.values.to_numpy().astype("<f4").tobytes())
                at = int(ends[-1])
            f.flush()
            self._values = np.memmap(f, np.float32, "r") if at else np.empty(0, np.float32)

    def _read(self, path: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None  # another process has set it aside
        if hashlib.sha256(data).hexdigest() == path.stem.removeprefix("part-"):
            return pq.read_table(pa.BufferReader(data))
        self.bad.append(path.name)
        warnings.warn(f"{path} is damaged; it is set aside and its log-probs are computed again", stacklevel=2)
        with contextlib.suppress(FileNotFoundError):  # another process may be faster
            path.rename(path.with_name(path.name + ".damaged"))
        return None

    def add(self, logps: Mapping[str, Logps]) -> None:
        """Write one more file, whole or not at all. `refresh` makes it visible here."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not logps:
            return
        schema = pa.schema([("key", pa.string()), ("logps", pa.list_(pa.float32()))], metadata=self.about)
        columns = [list(logps), [np.asarray(v, np.float32) for v in logps.values()]]
        table = pa.table([pa.array(c, t) for c, t in zip(columns, schema.types)], schema=schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="none", use_dictionary=False)
        data = buffer.getvalue()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".unfinished", delete=False) as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(f.name, 0o644)
        os.replace(f.name, self.folder / f"part-{hashlib.sha256(data).hexdigest()}.parquet")
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

"""Checkpoints that are whole or known not to be.

A checkpoint is sealed when every rank has written its part: a manifest with the size and SHA-256 of every file is
synced to disk and put in place atomically. What has no manifest, or differs from it, is broken. The checkpoint before
is removed only after its successor is sealed. The run folder must be visible to all ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from po.errors import POError, UserError
from po.ranks import gather, rank

MANIFEST = "manifest.json"
_SAVING = "saving"  # in a folder that is being written: what a killed run leaves behind can be told from others' files
_NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(POError):
    """A checkpoint could not be written. The one before is untouched."""


def _agree(mine: str | None) -> str | None:
    """What any rank says (the first that says something), on all ranks; also a barrier."""
    return next((s for s in gather(mine) if s is not None), None)


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders checkpoint-N, the newest first, sound or not."""
    found = [p for p in run_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def _files(folder: Path) -> list[str]:
    names = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in names if n not in (MANIFEST, f"{MANIFEST}.tmp", _SAVING))


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as f:
        return path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest()


def _digests(folder: Path, names: list[str]) -> list[tuple[int, str]]:
    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter
        return list(pool.map(lambda n: _digest(folder / n), names))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Declare the checkpoint whole. Every rank calls it after writing its files; it returns when the manifest, with
    `meta` in it, is on disk. SaveError on all ranks where rank 0 could not write it."""
    _agree(None)  # every rank has written
    failed = None
    if rank() == 0:
        try:
            _write_manifest(folder, meta)
        except OSError as e:
            failed = _explain(folder, e)
    failed = _agree(failed)
    if failed is not None:
        raise SaveError(failed)


def _write_manifest(folder: Path, meta: Mapping[str, Any]) -> None:
    names = _files(folder)
    manifest = {"meta": dict(meta), "files": dict(zip(names, _digests(folder, names)))}
    for name in names:
        _sync(folder / name)
    for below in (p for p in folder.rglob("*") if p.is_dir()):
        _sync(below)
    staged = folder / f"{MANIFEST}.tmp"
    with staged.open("w") as f:
        json.dump(manifest, f)
        f.flush()
        os.fsync(f.fileno())
    staged.replace(folder / MANIFEST)
    (folder / _SAVING).unlink(missing_ok=True)
    _sync(folder)
    _sync(folder.parent)


def _manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest, or why there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {str(n): (int(size), str(digest)) for n, (size, digest) in manifest["files"].items()}
        return {"meta": dict(manifest["meta"]), "files": files}
    except FileNotFoundError:
        ours = (folder / _SAVING).exists()
        return "the run ended while saving it" if ours else f"it has no {MANIFEST}, so nothing says that it is whole"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} cannot be read ({type(e).__name__}: {e})"


def why_broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads and hashes every file."""
    manifest = _manifest(folder)
    if isinstance(manifest, str):
        return manifest
    files: dict[str, tuple[int, str]] = manifest["files"]
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not the {size} that were saved"
    for (name, (_, digest)), (_, now) in zip(files.items(), _digests(folder, list(files))):
        if now != digest:
            return f"{name} is not what was saved (its SHA-256 differs)"
    return None


def newest_sound(run_dir: Path, say: Callable[[str], object] = sys.stderr.write) -> Path | None:
    """The newest whole checkpoint, None where there is none. Broken ones on the way are named through `say` and set
    aside by renaming. Rank 0 decides; every rank must call it (with ranks, after the process group is up) and gets the
    same answer."""
    assert dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1, "ranks must agree on the checkpoint"
    pick = None
    if rank() == 0:
        for folder in checkpoints(run_dir):
            broken = why_broken(folder)
            if broken is None:
                pick = str(folder)
                break
            aside = _aside(folder)
            folder.rename(aside)
            say(f"checkpoint {folder} is broken: {broken}. It is set aside as {aside.name} and not used.\n")
    pick = _agree(pick)
    return None if pick is None else Path(pick)


def _aside(folder: Path) -> Path:
    kind = "unfinished" if (folder / _SAVING).exists() else "broken"
    n = 1
    while (aside := folder.with_name(f"{folder.name}.{kind}-{n}")).exists():
        n += 1
    return aside


def saved_meta(folder: Path) -> dict[str, Any]:
    """The `meta` a sound checkpoint was sealed with."""
    manifest = _manifest(folder)
    assert not isinstance(manifest, str), manifest
    meta: dict[str, Any] = manifest["meta"]
    return meta


def check_same(folder: Path, now: Mapping[str, Any]) -> None:
    """UserError where the checkpoint was saved under other conditions than `now` (number of ranks, rows, batch ...),
    so that going on would train something else than the uninterrupted run. Compares the keys that `now` has."""
    then = saved_meta(folder)
    now = json.loads(json.dumps(dict(now)))
    changed = [f"  {k}: saved with {then.get(k)!r}, now {v!r}" for k, v in now.items() if then.get(k) != v]
    if changed:
        raise UserError(
            f"{folder}: the recipe or the launch differs from the run that saved this checkpoint, so it cannot be "
            "continued exactly:\n" + "\n".join(changed) + "\nPut these back to continue it, or start a new run in "
            "another output_dir."
        )


def sealed_save(
    folder: Path, write: Callable[[], None], meta: Mapping[str, Any], keep: int | None, best: str | None = None
) -> None:
    """Write a checkpoint, seal it, and only then remove older ones. Every rank calls it.

    folder: RUN/checkpoint-N. write: fills it, on every rank. keep: how many sealed checkpoints stay (None: all), `best`
    always among them. A sealed checkpoint of this step stays as it is. SaveError where the disk is full or the folder
    cannot be written; the checkpoints before are then untouched and the unfinished one is removed to make room.
    """
    sealed = rank() == 0 and not isinstance(_manifest(folder), str)
    if _agree("sealed" if sealed else None):
        return
    try:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / _SAVING).touch()
        _agree(None)
        write()
        seal(folder, meta)
    except (OSError, RuntimeError, SafetensorError, SaveError) as e:
        if not isinstance(e, SaveError) and not _disk_failed(e):
            raise
        message = str(e) if isinstance(e, SaveError) else _explain(folder, e)
        shutil.rmtree(folder, ignore_errors=True)
        raise SaveError(message) from e
    if rank() == 0:
        rotate(folder.parent, keep, best)


def rotate(run_dir: Path, keep: int | None, best: str | None = None) -> None:
    """Remove all but the `keep` newest sealed checkpoints (never the newest, never `best`), and what killed saves and
    removals left behind. Damaged checkpoints that were set aside stay for the user to look at."""
    whole = [p for p in checkpoints(run_dir) if not isinstance(_manifest(p), str)]
    old = whole[max(keep, 1) :] if keep is not None else []
    for folder in old:
        if best is None or folder.name != Path(best).name:
            folder.rename(folder.with_name(f"{folder.name}.removed"))  # a kill leaves no half-removed checkpoint
    for pattern in ("checkpoint-*.removed", "checkpoint-*.unfinished-*"):
        for folder in run_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _disk_failed(error: BaseException) -> bool:
    """Whether a save failed for the disk. torch and safetensors wrap the system's error in their own."""
    text = f"{error}"
    told = (
        "No space left",
        "os error 28",
        "Disk quota",
        "File too large",
        "Input/output error",
        "Read-only file system",
    )
    if isinstance(error, OSError) or any(t in text for t in told):
        return True
    return "PytorchStreamWriter" in text or "unexpected pos" in text or "file write failed" in text


def _explain(folder: Path, error: BaseException) -> str:
    where = folder if folder.exists() else folder.parent
    free = shutil.disk_usage(where).free / 2**20
    full = free < 64 or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    cause = "the disk is full" if full else f"{type(error).__name__}: {error}"
    return (
        f"{folder}: the checkpoint could not be saved: {cause} ({free:.0f} MiB are free). The checkpoints before it "
        "are untouched. Make room (or lower save_total_limit, or set another output_dir), then run the same command "
        "with resume: true."
    )

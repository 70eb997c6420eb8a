"""Where a model's files are, and what they are: a fingerprint of their content, never of their path.

Only safetensors are read. A pickled checkpoint can run code when it is loaded, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from po.errors import UserError, suggest

_WORDS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_WEIGHTS = ["model*.safetensors", "adapter_model*.safetensors"]
_BIG = 32 << 20  # bytes; smaller files are hashed every time
_SETTLED = 2.0  # seconds a file must be unchanged before its digest is kept: clocks of file systems are coarse

# Fields that do not decide what the weights compute. Everything else counts: a needless miss only costs time.
_NOT_MODEL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "eos_token_id"}
_NOT_MODEL |= {"bos_token_id", "pad_token_id"}
_NOT_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "lora_dropout"}


def cache_root(kind: str) -> Path:
    """$PO_CACHE/kind, else ~/.cache/po/kind."""
    return Path(os.environ.get("PO_CACHE") or Path.home() / ".cache" / "po").expanduser() / kind


def locate(
    name_or_path: str, revision: str | None = None, where: str = "model.name_or_path", weights: bool = True
) -> Path:
    """The folder that holds a model or an adapter: a local one, or the hub's snapshot (downloaded where needed,
    without the weights where only the tokenizer is wanted).

    Raises UserError where there is no such folder, the hub has no such name, or it cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UserError(f"{where}: {name_or_path!r} is a file; expected the folder it lies in, or a hub name")
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) and not name_or_path.startswith(".")
    if not named or ("/" in name_or_path and path.parent.is_dir()):
        near = suggest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"{where}: there is no folder {name_or_path!r}.{near} Expected a model folder or a hub name")
    return _snapshot(name_or_path, revision, where, _WORDS + _WEIGHTS if weights else _WORDS)


def _snapshot(name: str, revision: str | None, where: str, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.GatedRepoError as e:
        raise UserError(f"{where}: {name!r} is gated; accept its terms on the hub and log in (`hf auth login`)") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(
            f"{where}: there is no folder {name!r} here and no such model on the hub (or it is private: "
            "`hf auth login`). Check the spelling"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{where}: the hub's {name!r} has no revision {revision!r}") from e
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        raise UserError(
            f"{where}: there is no folder {name!r} here, it is not in the hub's cache, and the hub cannot be reached "
            f"({type(e).__name__}). Give the path of a model folder, or download it first: hf download {name}"
        ) from e


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def weight_files(folder: Path, where: str = "model.name_or_path") -> list[Path]:
    """The safetensors files of a model or adapter folder, those that `from_pretrained` would read, by name.

    Raises UserError where the folder holds no weights, only pickled ones, or an incomplete set.
    """
    single = "adapter_model.safetensors" if is_adapter(folder) else "model.safetensors"
    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
        names = [single]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        raise UserError(f"{where}: {_why_no_weights(folder, single)}")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{where}: {folder} lacks the weight file {name!r} that {index.name} lists; get it again")
    return [folder / name for name in names]


def _why_no_weights(folder: Path, single: str) -> str:
    pickled = sorted(p.name for p in folder.glob("*.bin") if p.name.startswith(("pytorch_model", "adapter_model")))
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are loaded. Expected "
            f"safetensors: load it once where you trust it and `save_pretrained` it again"
        )
    near = sorted(p.parent.name for p in folder.glob(f"*/{single}*"))
    hint = f" Its subfolder {near[0]!r} does: did you mean that?" if near else ""
    return f"{folder} is not a model folder: it has no {single}.{hint}"


def fingerprint(name_or_path: str, revision: str | None = None, where: str = "model.name_or_path") -> str:
    """SHA-256 over the weight files (names and bytes), the configuration and the folder's own Python code.

    The same files at another path have the same fingerprint; one changed bit has another. Works for models and
    adapters, local or on the hub. Raises UserError as `locate` and `weight_files` do.
    """
    folder = locate(name_or_path, revision, where)
    h = hashlib.sha256(b"po-weights-1\n")
    for path in [*weight_files(folder, where), *sorted(folder.glob("*.py"))]:
        h.update(f"{path.name} {_digest(path)}\n".encode())
    h.update(json.dumps(read_config(folder, where, essential=True), sort_keys=True).encode())
    return h.hexdigest()


def read_config(folder: Path, where: str = "model.name_or_path", essential: bool = False) -> dict[str, Any]:
    """config.json or adapter_config.json; `essential` leaves out what does not change what the weights compute."""
    path = folder / ("adapter_config.json" if is_adapter(folder) else "config.json")
    if not path.is_file():
        raise UserError(f"{where}: {folder} is not a model folder: it has no config.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise UserError(f"{where}: {path} is not valid JSON ({e})") from e
    if not essential:
        return config
    if is_adapter(folder):  # PEFT writes sets, in any order
        config = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items()}
        return {k: v for k, v in config.items() if k not in _NOT_ADAPTER}
    return {k: v for k, v in config.items() if k not in _NOT_MODEL}


def checkpoint_dtype(folder: Path) -> str:
    """The dtype that `dtype: auto` loads: what config.json says, else that of the first floating-point tensor."""
    config = read_config(folder)
    said = config.get("dtype") or config.get("torch_dtype")
    if said:
        return str(said).removeprefix("torch.")
    from safetensors import safe_open

    floats = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for path in weight_files(folder):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                if (kind := f.get_slice(name).get_dtype()) in floats:
                    return floats[kind]
    return "float32"


def _digest(path: Path) -> str:
    """SHA-256 of a file. A big file's is kept in the cache under its path, size, times and inode.

    The change time is part of the key: `cp -p`, `rsync -t` and `touch -d` can fake the modification time, not that.
    """
    before = _identity(path)
    if os.stat(path).st_size < _BIG:
        return _sha256(path)
    kept = cache_root("digests") / hashlib.sha256(repr(before).encode()).hexdigest()
    if kept.is_file() and re.fullmatch("[0-9a-f]{64}", known := kept.read_text("ascii", "replace")):
        return known
    found = _sha256(path)
    info = os.stat(path)
    if _identity(path) != before:
        raise UserError(f"{path} changed while it was read; wait until the copy is complete and start again")
    if time.time() - max(info.st_mtime, info.st_ctime) > _SETTLED:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as f:
            f.write(found)
        os.replace(f.name, kept)
    return found


def _identity(path: Path) -> tuple[str, int, int, int, int, int]:
    s = os.stat(path)
    return str(path.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""Scripts of data_prep/ as tests run them: in this process, on small files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A file of data_prep/ as a module."""
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", ROOT / "data_prep" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    """Its rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def ran(name: str, *argv: str, output: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
    """What a script makes of some rows, and its report. argv: what stands before the input, then `--` and the rest."""
    source = write(output.with_name(f"{output.stem}-in.jsonl"), rows)
    at = argv.index("--") if "--" in argv else 0
    before, after = argv[:at], argv[at + 1 :] if "--" in argv else argv
    script(name).main([*before, source, "-o", str(output), "--force", *after])
    return read(output), json.loads(output.with_name(output.name + ".report.json").read_text())

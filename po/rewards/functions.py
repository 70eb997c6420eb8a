"""Python reward functions, called as TRL calls them.

`f(prompts=..., completions=..., completion_ids=..., **columns)` returns one number or None per completion. A function
without `**kwargs` gets only what it names. An async function is awaited.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from po.errors import suggest
from po.rewards.cells import Call

_loaded: dict[str, Callable[..., Any]] = {}  # of this process


@dataclass(frozen=True)
class Function:
    """`path/file.py:name` or `package.module:name`."""

    target: str
    rows = False

    def patience(self, seconds: float) -> float:
        """A call has its time and no more."""
        return seconds

    def load(self) -> None:
        """Import the module. ValueError where there is no such file, module or function."""
        where, _, name = self.target.rpartition(":")
        if not where or not name:
            raise ValueError(f"{self.target!r} names no function; expected path/file.py:name or package.module:name")
        module = _file(Path(where).expanduser()) if where.endswith(".py") else _module(where)
        if not callable(getattr(module, name, None)):
            known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
            raise ValueError(f"{where} has no function {name!r}.{suggest(name, known)}")
        _loaded[self.target] = getattr(module, name)

    def answers(self, call: Call) -> Iterator[Any]:
        """What the function returns."""
        function = _loaded[self.target]
        output = function(**_taken(function, call.arguments()))
        yield asyncio.run(_wait(output)) if inspect.isawaitable(output) else output


async def _wait(output: Awaitable[Any]) -> Any:
    return await output


def _taken(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no signature to be had
        return arguments
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {k: v for k, v in arguments.items() if k in {p.name for p in parameters}}


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise ValueError(f"there is no file {str(path)!r}.{near}")
    sys.path.insert(0, str(path.resolve().parent))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(f"po_rewards_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{name}.".startswith(f"{e.name}."):
            raise  # found, but one of its own imports is missing
        raise ValueError(f"there is no module {name!r} on the Python path; a file is written path/file.py:name") from e

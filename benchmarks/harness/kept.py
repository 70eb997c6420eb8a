"""Results that a benchmark keeps, so that it goes on where it stopped: a line of JSON for each finished run."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(path: Path, parts: tuple[Any, ...], code: type, make: Callable[[], Any]) -> Any:
    """What `make` gives, or gave before. Known by `parts` (all that decides it) and by the file that `code` is in."""
    text = repr(parts).encode() + Path(inspect.getfile(code)).read_bytes()
    key = hashlib.sha256(text).hexdigest()[:20]
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:  # the last line, cut off by an interruption
            continue
        if found["key"] == key:
            return found["result"]
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps({"key": key, "result": result}) + "\n")
    return result

"""What a step reads: found, hashed, and told apart from what it writes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from po.data.sources import Opened, open_sources
from po.errors import UserError
from po.folder import redact
from po.prep.partial import sha256
from po.spec import Source


def open_inputs(sources: Sequence[Source]) -> list[Opened]:
    """The sources, found. Raises UserError for what is not there."""
    try:
        return open_sources(sources, "input")
    except UserError as e:
        raise UserError(str(e).removeprefix("data.input: ")) from e


def check_apart(opened: Sequence[Opened], output: Path) -> None:
    """Raises UserError where the output is one of the inputs."""
    for file in (f for one in opened for f in one.files):
        if file.resolve() == output.resolve():
            raise UserError(f"{output}: is an input as well; name another output")


def describe(one: Opened) -> list[dict[str, Any]]:
    """Each file of a source with its hash, and what was said about how to read it."""
    if one.dataset is not None:
        return [
            {
                "path": one.source.path,
                "name": one.names[0],
                "fingerprint": one.dataset._fingerprint,
                **_source_options(one),
            }
        ]
    return [
        {"path": str(f), "name": n, "bytes": f.stat().st_size, "sha256": sha256(f), **_source_options(one)}
        for f, n in zip(one.files, one.names)
    ]


def _source_options(one: Opened) -> dict[str, Any]:
    given = asdict(replace(one.source, path=""))
    return {k: v for k, v in given.items() if v not in (None, "", {})}


def command() -> str:
    """The command line, without secrets."""
    words = [str(redact(w)) for w in sys.argv]
    for i, word in enumerate(words):
        flag, sign, value = word.partition("=")
        if sign and redact({flag: value}) != {flag: value}:
            words[i] = f"{flag}=[redacted]"
        elif i and words[i - 1].startswith("-") and redact({words[i - 1]: word}) != {words[i - 1]: word}:
            words[i] = "[redacted]"
    return shlex.join(words)

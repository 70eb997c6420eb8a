"""Prompts for models: texts with an id, a version and a hash, which rows and reports name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from po.errors import UserError, suggest

_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """A text with {places}. Whoever changes the text raises the version. marker: what a reply must have before the
    part of it that counts; "" where all of it counts."""

    id: str
    version: int | str
    text: str
    marker: str = ""

    @property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode(errors="backslashreplace")).hexdigest()

    @property
    def places(self) -> frozenset[str]:
        """The names in braces."""
        return frozenset(_PLACE.findall(self.text))

    def fill(self, **values: str) -> str:
        """The text with its places filled; braces in the values stay what they are."""
        return _PLACE.sub(lambda found: values[found[1]], self.text)

    @property
    def said(self) -> dict[str, str]:
        """What rows and reports say of it."""
        return {"id": self.id, "version": str(self.version), "sha256": self.sha256}


def replaced(own: Iterable[Prompt], given: Sequence[str]) -> dict[str, Prompt]:
    """A command's prompts by id, those of `--prompt-file ID=FILE` in the place of po's own; their version is `file`.

    Raises UserError for an id that the command has no prompt of, and a text without the places or the marker of po's.
    """
    found = {prompt.id: prompt for prompt in own}
    known = dict(found)
    for one in given:
        name, sign, path = one.partition("=")
        if not sign or name not in known:
            near = suggest(name, known)
            raise UserError(f"--prompt-file: expected ID=FILE, of {', '.join(known)}; got {one!r}.{near}")
        found[name] = replace(known[name], version="file", text=_read(Path(path)))
        for lacking in sorted(known[name].places - found[name].places):
            raise UserError(f"{path}: expected {{{lacking}}} in the text, where that is put in")
        if strange := sorted(found[name].places - known[name].places):
            raise UserError(f"{path}: {{{strange[0]}}}: nothing is put in there. Known: {sorted(known[name].places)}")
        if known[name].marker not in found[name].text:
            raise UserError(f"{path}: expected a text that asks for the marker {known[name].marker}")
    return found


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt-file: {path}: cannot be read: {e}") from e
    if not text:
        raise UserError(f"--prompt-file: {path}: expected a text, got an empty file")
    return text

"""Responses that say nothing new: equal but for case, spaces and Unicode form, or nearly the same in their words."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field

from po.prep.near import jaccard, shingles

SAME, NEAR = "the same as another", "nearly the same as another"


@dataclass
class Distinct:
    """What was said so far. near: from which Jaccard similarity of word triples on a response is nearly the same; above
    1 none is. Of a prompt's few responses all are compared, exactly."""

    near: float
    _texts: set[str] = field(default_factory=set)
    _pieces: list[set[str]] = field(default_factory=list)

    def add(self, text: str) -> str | None:
        """Why it says nothing new; None where it does, and then it counts for later ones."""
        plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        if plain in self._texts:
            return SAME
        pieces = shingles(plain)
        if any(jaccard(pieces, other) >= self.near for other in self._pieces):
            return NEAR
        self._texts.add(plain)
        self._pieces.append(pieces)
        return None

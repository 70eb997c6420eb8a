"""Which tokens of a pair were edited."""

from __future__ import annotations

from difflib import SequenceMatcher
from functools import lru_cache

Ids = tuple[int, ...]


@lru_cache(maxsize=1024)
def edited(a: Ids, b: Ids) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each token of two responses, whether it is part of a replacement, insertion or deletion between them."""
    marks = [True] * len(a), [True] * len(b)
    for i, j, n in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        marks[0][i : i + n] = marks[1][j : j + n] = [False] * n
    return tuple(marks[0]), tuple(marks[1])

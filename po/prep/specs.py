"""Pairs that teach form alone: the same right answer in its format and with the format broken (SPECS).

Metis-SPECS: Decoupling Multimodal Learning via Self-distilled Preference-based Cold Start, by its README: chosen is
right in the right format, rejected right in a corrupted one. Unverified: how the authors corrupt; these ways are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Sections = Sequence[str]  # names of tags, in order: think, answer


def in_format(text: str, tags: Sections) -> bool:
    """Whether the text is these sections, each once and in order, and nothing else but white space."""
    return _read(text, tags) is not None


def _read(text: str, tags: Sections) -> list[str] | None:
    pattern = r"\s*".join(f"<{re.escape(t)}>(.*?)</{re.escape(t)}>" for t in tags)
    found = re.fullmatch(rf"\s*{pattern}\s*", text, re.DOTALL)
    if found is None or any(text.count(mark) != 1 for t in tags for mark in (f"<{t}>", f"</{t}>")):
        return None
    return list(found.groups())


def corruptions(text: str, tags: Sections) -> dict[str, str]:
    """By name, every way to break the format of a text that is in it; what stands in the sections is not changed."""
    found = _read(text, tags)
    if found is None:
        raise ValueError("expected a text in its format")
    made: dict[str, str] = {}
    for t in tags:
        start, end = f"<{t}>", f"</{t}>"
        made[f"no {start}"] = text.replace(start, "")
        made[f"no {end}"] = text.replace(end, "")
        made[f"{start} twice"] = text.replace(end, start)
        made[f"[{t}]"] = text.replace(start, f"[{t}]").replace(end, f"[/{t}]")
    made["no tags"] = _without(text, tags)
    if len(tags) > 1:
        made["sections in reverse"] = "\n".join(f"<{t}>{x}</{t}>" for t, x in reversed(list(zip(tags, found))))
    return {name: broken for name, broken in made.items() if not in_format(broken, tags)}


def _without(text: str, tags: Sections) -> str:
    for t in tags:
        text = text.replace(f"<{t}>", "").replace(f"</{t}>", "")
    return text


def corrupt(text: str, tags: Sections, lot: bytes) -> tuple[str, str]:
    """One corruption, drawn by the lot: its name and the text."""
    ways = sorted(corruptions(text, tags).items())
    return ways[int.from_bytes(lot[:8], "big") % len(ways)]

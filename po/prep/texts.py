"""Texts made comparable: normalised, hashed, cut into n-grams; the prompts of test sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from po.data.rows import Row


def text_of(content: object) -> str:
    """A text as it is, messages as their contents."""
    return content if isinstance(content, str) else "\n".join(str(m.get("content", "")) for m in content)  # type: ignore[attr-defined]


def normal(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


def hashed(*texts: str) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(errors="replace"), digest_size=8).digest(), "little")


def asked_of(row: Row) -> str:
    """The text of the prompt; of a conversation what the user said."""
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n".join(str(m.get("content", "")) for m in row.prompt if m.get("role") == "user")


@dataclass
class Tests:
    """Prompts and n-grams of test sets, and where they are."""

    size: int = 8
    prompts: dict[int, str] = field(default_factory=dict)
    grams: dict[str, str] = field(default_factory=dict)

    def add(self, prompt: str, where: str) -> None:
        """Take a test prompt in."""
        self.prompts.setdefault(hashed(normal(prompt)), where)
        for gram in _grams(prompt, self.size):
            self.grams.setdefault(gram, where)

    def overlap(self, prompt: str) -> tuple[str, str, float] | None:
        """The first n-gram that a prompt shares with a test prompt, and how much of it such n-grams cover."""
        found = [(at, gram) for at, gram in enumerate(_grams(prompt, self.size)) if gram in self.grams]
        if not found:
            return None
        covered = {k for at, _ in found for k in range(at, at + self.size)}
        return found[0][1], self.grams[found[0][1]], len(covered) / len(prompt.split())


def _grams(prompt: str, size: int) -> list[str]:
    words = normal(prompt).split()
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]

"""Two models behind one Chat: a request that is a `Second` goes to the second one (a teacher, the iteration before)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from po.prep.chat import Answer, Ask, Chat


@dataclass(frozen=True, kw_only=True)
class Second(Ask):
    """A request to the second model."""


class Two:
    """A Chat of two; the name is the first one's. Without a first one no request may be for it."""

    def __init__(self, first: Chat | None, second: Chat) -> None:
        self.name = (first or second).name
        self._first, self._second = first, second

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Each model's requests at once; answers in the order of asks."""
        found: dict[int, Answer] = {}
        for chat, wanted in ((self._first, False), (self._second, True)):
            some = [i for i, a in enumerate(asks) if isinstance(a, Second) is wanted]
            if some:
                assert chat is not None
                found.update(zip(some, chat.ask([_plain(asks[i]) for i in some]), strict=True))
        return [found[i] for i in range(len(asks))]


class Nobody:
    """In the place of a model where nothing is asked."""

    name = ""

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Of nothing nothing."""
        assert not asks
        return []


def _plain(ask: Ask) -> Ask:
    return Ask(**{f.name: getattr(ask, f.name) for f in fields(Ask)})

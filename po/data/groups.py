"""Items of examples as a torch dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.utils.data import Dataset

from po.data.rows import Example, Item, Other
from po.data.store import light

Pick = tuple[int, bool]  # an item's index, and whether it counts (False: a filler that keeps ranks in step)


class Group(NamedTuple):
    """What Collate takes of each group."""

    example: Example
    item: Item
    counts: bool = True  # False: a filler
    other: tuple[int, ...] = ()  # the token ids of item.other


@dataclass(frozen=True)
class Groups(Dataset[Group]):
    """Items of examples as a torch dataset; indexed by Pick."""

    examples: Sequence[Example]
    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, pick: Pick) -> Group:
        item = self.items[pick[0]]
        return Group(self.examples[item.example], item, pick[1], self.ids_of(item.other))

    def ids_of(self, other: Other | None) -> tuple[int, ...]:
        """Token ids of another row's response; () for None."""
        return () if other is None else self.examples[other.example].response_ids[other.response][: other.tokens]

    def light(self) -> Groups:
        """The same without what is heavy to read, to look through token ids."""
        return Groups(light(self.examples), self.items)

    def sizes(self) -> list[int]:
        """Tokens of each item: its prompt once, and its responses."""
        lengths = [(len(e.prompt_ids), [len(r) for r in e.response_ids]) for e in light(self.examples)]
        others = [0 if i.other is None else i.other.tokens for i in self.items]
        own = [lengths[i.example][0] + sum(lengths[i.example][1][k] for k in i.responses) for i in self.items]
        return [a + b for a, b in zip(own, others)]

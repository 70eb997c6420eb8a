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
        """Tokens of each item: its prompt once, and its responses; and again with its privileged prompt."""
        lengths = [
            (len(e.prompt_ids), [*map(len, e.response_ids)], len(e.privileged_ids or ())) for e in light(self.examples)
        ]
        sizes = []
        for item in self.items:
            prompt, each, privileged = lengths[item.example]
            responses = sum(each[k] for k in item.responses)
            other = 0 if item.other is None else item.other.tokens
            sizes.append(prompt + responses + other + (privileged + responses if privileged else 0))
        return sizes

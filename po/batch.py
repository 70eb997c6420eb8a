"""One micro-batch: a stream of tokens, and the (G, K) facts about its responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from po.data.rows import Example, Item
from po.forest import Forest, Padded, pad, plant
from po.types import HeadInput, Segments

_T = TypeVar("_T")
Pick = tuple[int, bool]  # an item's index, and whether it counts (False: a filler that keeps ranks in step)
LookUp = Callable[[Sequence[int], Sequence[int]], Any]  # prompt ids, response ids -> reference log-probs per token


@dataclass(frozen=True)
class Batch:
    """G groups. ref_T, old_T are fp32 and in the stream's token order; reward_GK is fp32."""

    stream: Forest | Padded
    seg: Segments
    ids: tuple[str, ...]  # the row of each group
    ref_T: Tensor | None = None
    old_T: Tensor | None = None
    reward_GK: Tensor | None = None
    label_GK: Tensor | None = None
    best_first: bool = False  # pairs stand best first, whatever their rewards say

    def to(self, device: torch.device | str) -> Batch:
        """Move, never cast: HF's Trainer would round float inputs to bf16 under DeepSpeed (-734.3 becomes -736)."""
        return _move(self, device)

    def head_input(self, policy_T: Tensor, ref_T: Tensor | None) -> HeadInput:
        """What the heads see of this batch."""
        return HeadInput(
            self.seg,
            policy_T,
            ref=ref_T,
            old=self.old_T,
            reward=self.reward_GK,
            label=self.label_GK,
            best_first=self.best_first,
        )


def _move(x: _T, device: torch.device | str) -> _T:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)  # type: ignore[return-value]
    if is_dataclass(x) and not isinstance(x, type):
        moved = {f.name: _move(getattr(x, f.name), device) for f in fields(x) if f.init}
        return replace(x, **moved)
    return x


@dataclass(frozen=True)
class Groups(Dataset[tuple[Example, Item, bool]]):
    """Items of examples as a torch dataset; indexed by Pick."""

    examples: Sequence[Example]
    items: Sequence[Item]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, pick: Pick) -> tuple[Example, Item, bool]:
        item = self.items[pick[0]]
        return self.examples[item.example], item, pick[1]

    def sizes(self) -> list[int]:
        """Tokens of each item: its prompt once, and its responses."""
        lengths = [(len(e.prompt_ids), [len(r) for r in e.response_ids]) for e in self.examples]
        return [lengths[i.example][0] + sum(lengths[i.example][1][k] for k in i.responses) for i in self.items]


def _grid(values: Sequence[Sequence[float] | None], K: int, dtype: torch.dtype) -> Tensor | None:
    if any(v is None for v in values):
        return None
    rows = [[*v, *[0] * (K - len(v))] for v in values if v is not None]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Collate:
    """Groups -> Batch. `reference` looks cached log-probs up; None where the trainer computes them or none are needed.
    `best_first`: the items are pairs."""

    share_prefix: bool = True
    reference: LookUp | None = None
    best_first: bool = False

    def __call__(self, groups: Sequence[tuple[Example, Item, bool]]) -> Batch:
        K = max(len(item.responses) for _, item, _ in groups)
        ids = [(e.prompt_ids, [e.response_ids[k] for k in item.responses]) for e, item, _ in groups]
        valid_GK = torch.tensor([[c and k < len(i.responses) for k in range(K)] for _, i, c in groups])
        stream = plant(ids, K) if self.share_prefix else pad(ids, K)
        ref_T = old_T = None
        if self.reference is not None:
            look = self.reference
            ref_T = _flat([look(p, r) for p, rs in ids for r in rs])
        if all(e.logps is not None for e, _, _ in groups):
            old_T = _flat([e.logps[k] for e, item, _ in groups if e.logps for k in item.responses])
        return Batch(
            stream,
            Segments(stream.slot_T, valid_GK),
            tuple(e.id for e, _, _ in groups),
            ref_T,
            old_T,
            _grid([_pick(e.reward, item) for e, item, _ in groups], K, torch.float32),
            _grid([_pick(e.label, item) for e, item, _ in groups], K, torch.int64),
            self.best_first,
        )


def _pick(values: Sequence[float] | None, item: Item) -> list[float] | None:
    return None if values is None else [values[k] for k in item.responses]


def _flat(parts: Sequence[Any]) -> Tensor:
    return torch.tensor([x for p in parts for x in p], dtype=torch.float32)

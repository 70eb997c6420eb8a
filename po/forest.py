"""The packed forest: each prompt once, each response as a branch of it, groups one after the other without padding.

One integer per position says who may look at it:

    token i sees token j   <=>   j <= i < subtree_end_S[j]

Positions restart at the branching point, so a response never knows that it has siblings. A branch begins with a copy of
the prompt's last token, so that the ordinary next-token shift predicts the first token of every branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # prompt ids, response ids per response


@dataclass(frozen=True)
class Tree:
    """Where one group lies in the stream: a trunk, then its branches, as half-open intervals of positions."""

    trunk: tuple[int, int]
    branches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Forest:
    """S stream positions, T response tokens in stream order. All tensors int64."""

    input_S: Tensor
    position_S: Tensor
    subtree_end_S: Tensor
    at_T: Tensor  # the position that predicts response token t
    target_T: Tensor  # response token t
    slot_T: Tensor  # g * K + k of the response that owns token t
    trees: tuple[Tree, ...]

    def visible_SS(self, window: int | None = None) -> Tensor:
        """Who sees whom, (S, S) bool, query x key; with a sliding window only keys less than `window` positions back."""
        i_S = torch.arange(self.input_S.numel(), device=self.input_S.device)
        seen_SS = (i_S[None, :] <= i_S[:, None]) & (i_S[:, None] < self.subtree_end_S[None, :])
        if window is not None:
            seen_SS &= self.position_S[:, None] - self.position_S[None, :] < window
        return seen_SS


def plant(groups: Sequence[Group], K: int) -> Forest:
    """Lay groups out as one stream. Raises AssertionError on an empty prompt or response: neither can be scored."""
    ids: list[int] = []
    pos: list[int] = []
    end: list[int] = []
    at: list[int] = []
    target: list[int] = []
    slot: list[int] = []
    trees = []
    for g, (prompt, responses) in enumerate(groups):
        assert len(prompt) > 0 and all(len(r) > 0 for r in responses) and len(responses) <= K
        start, trunk = len(ids), len(prompt) - 1
        total = trunk + sum(1 + len(r) - 1 for r in responses)
        ids += prompt[:-1]
        pos += range(trunk)
        end += [start + total] * trunk
        branches = []
        for k, r in enumerate(responses):
            b = len(ids)
            ids += [prompt[-1], *r[:-1]]  # the last token predicts nothing that is scored
            pos += range(trunk, trunk + len(r))
            end += [b + len(r)] * len(r)
            at += range(b, b + len(r))
            target += r
            slot += [g * K + k] * len(r)
            branches.append((b, b + len(r)))
        trees.append(Tree((start, start + trunk), tuple(branches)))
    return Forest(*(torch.tensor(x, dtype=torch.int64) for x in (ids, pos, end, at, target, slot)), tuple(trees))

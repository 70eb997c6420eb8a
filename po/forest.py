"""Groups of token ids -> one stream. The packed forest: each prompt once, each response as a branch of it, groups one
after the other without padding.

One integer per position says who may look at it:

    token i sees token j   <=>   j <= i < subtree_end_S[j]

Positions restart at the branching point, so a response never knows that it has siblings. A branch begins with a copy of
the prompt's last token, so that the ordinary next-token shift predicts the first token of every branch. The trees tile
the stream, and the branches of a tree follow its trunk without a gap: trunk and first branch are one plain sequence.

`pad` is the stream of models that cannot share a prompt: one right-padded row per response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # prompt ids, response ids per response


@dataclass(frozen=True)
class Tree:
    """Where one group lies in the stream: a trunk, then its branches, as half-open intervals of positions."""

    trunk: tuple[int, int]
    branches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Forest:
    """S stream positions, T response tokens in stream order. All tensors int64. Compared and hashed by identity."""

    input_S: Tensor
    position_S: Tensor
    subtree_end_S: Tensor
    at_T: Tensor  # the position that predicts response token t
    target_T: Tensor  # response token t
    slot_T: Tensor  # g * K + k of the response that owns token t
    trees: tuple[Tree, ...]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence (prompt and one response, less the last token, which predicts nothing)."""
        return max(t.trunk[1] - t.trunk[0] + max(e - s for s, e in t.branches) for t in self.trees)

    def visible_SS(self, window: int | None = None) -> Tensor:
        """Who sees whom, (S, S) bool, query x key; with a window, only keys less than `window` positions back."""
        i_S = torch.arange(self.input_S.numel(), device=self.input_S.device)
        seen_SS = (i_S[None, :] <= i_S[:, None]) & (i_S[:, None] < self.subtree_end_S[None, :])
        if window is not None:
            seen_SS &= self.position_S[:, None] - self.position_S[None, :] < window
        return seen_SS


@dataclass(frozen=True, eq=False)
class Padded:
    """N responses, each in a row of its own after its prompt, right-padded to L; T response tokens in row order.

    All tensors int64. mask_NL is 1 at tokens and 0 at padding; at_T indexes the rows laid end to end (N * L).
    """

    input_NL: Tensor
    mask_NL: Tensor
    at_T: Tensor
    target_T: Tensor
    slot_T: Tensor


def _slots(groups: Sequence[Group], K: int) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
    """(slot, prompt, response) of every response; AssertionError on what cannot be scored."""
    for g, (prompt, responses) in enumerate(groups):
        assert len(prompt) > 0, "an empty prompt cannot be scored"
        assert 0 < len(responses) <= K, f"{len(responses)} responses where 1 to {K} are expected"
        assert all(len(r) > 0 for r in responses), "an empty response cannot be scored"
        yield from ((g * K + k, prompt, r) for k, r in enumerate(responses))


def _int64(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def plant(groups: Sequence[Group], K: int) -> Forest:
    """Lay groups out as one stream; group g's k-th response gets slot g * K + k.

    Raises AssertionError on an empty prompt or response and on a group with no response or more than K.
    """
    ids: list[int] = []
    pos: list[int] = []
    end: list[int] = []
    at: list[int] = []
    trees: list[Tree] = []
    scored = list(_slots(groups, K))
    for prompt, responses in groups:
        start, trunk = len(ids), len(prompt) - 1
        ids += prompt[:-1]
        pos += range(trunk)
        end += [start + trunk + sum(map(len, responses))] * trunk
        branches = []
        for r in responses:
            b, e = len(ids), len(ids) + len(r)
            ids += [prompt[-1], *r[:-1]]  # the last token predicts nothing that is scored
            pos += range(trunk, trunk + len(r))
            end += [e] * len(r)
            at += range(b, e)
            branches.append((b, e))
        trees.append(Tree((start, start + trunk), tuple(branches)))
    target = [token for _, _, r in scored for token in r]
    slot = [s for s, _, r in scored for _ in r]
    return Forest(_int64(ids), _int64(pos), _int64(end), _int64(at), _int64(target), _int64(slot), tuple(trees))


def pad(groups: Sequence[Group], K: int) -> Padded:
    """One right-padded row per response; tokens, slots and errors as in `plant`."""
    scored = list(_slots(groups, K))
    length = max(len(p) + len(r) - 1 for _, p, r in scored)  # the last token predicts nothing that is scored
    rows: list[list[int]] = []
    mask: list[list[int]] = []
    at: list[int] = []
    for n, (_, p, r) in enumerate(scored):
        row = [*p, *r[:-1]]
        rows.append(row + [0] * (length - len(row)))
        mask.append([1] * len(row) + [0] * (length - len(row)))
        at += range(n * length + len(p) - 1, n * length + len(row))
    target = [token for _, _, r in scored for token in r]
    slot = [s for s, _, r in scored for _ in r]
    return Padded(_int64(rows), _int64(mask), _int64(at), _int64(target), _int64(slot))

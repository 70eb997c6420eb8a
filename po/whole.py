"""All groups of an optimizer step as one HeadInput, over micro-batches and ranks, for heads that couple the batch.

A loss sees the model only through a few numbers per token (its signals: the log-probs above all). So the objective and
its gradient with respect to the signals are taken once, on the groups of the whole step, and each micro-batch's
backward pass is that of sum(signal * gradient): exact, whatever the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from po.objective import Parts, Scope, objective
from po.ranks import gather, rank
from po.spec import Term
from po.types import HeadInput, Segments

_LEARNED = ("policy_T", "token_kl", "candidate", "privileged")  # per token, with gradient; so are the gates
_TOKENS = (*_LEARNED, "ref", "old", "correction", "collision", "differs", "teacher", "teacher_ref")
_GROUPS = ("prompt_embedding", "mismatch", "row")
_GRIDS = ("reward", "label", "embedding")
_NAMED = ("columns", "response_columns", "token_columns", "gates", "old_gates")

State = Mapping[str, Tensor]


def signals(x: HeadInput) -> dict[str, Tensor]:
    """What of an input carries gradient, each (T, ...)."""
    named = {name: getattr(x, name) for name in _LEARNED if getattr(x, name) is not None}
    return named | {f"gates.{name}": gate for name, gate in x.gates.items()}


def with_signals(x: HeadInput, new: Mapping[str, Tensor]) -> HeadInput:
    """The same input with other signals."""
    learned: dict[str, Any] = {name: new[name] for name in _LEARNED if name in new}
    gates = {name: new.get(f"gates.{name}", gate) for name, gate in x.gates.items()}
    return replace(x, gates=gates, **learned)


def moved(x: Any, device: torch.device | str) -> Any:
    """A HeadInput, or what is in it, on a device and without gradient."""
    if isinstance(x, Tensor):
        return x.detach().to(device)
    if isinstance(x, Mapping):
        return {k: moved(v, device) for k, v in x.items()}
    if isinstance(x, HeadInput | Segments):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})
    return x


def join(parts: Sequence[HeadInput]) -> HeadInput:
    """Groups and tokens one after the other, every group as wide as the widest."""
    K = max(p.seg.valid_GK.shape[1] for p in parts)
    slots, first = [], 0
    for p in parts:
        G, width = p.seg.valid_GK.shape
        slots.append((first + p.seg.slot_T // width) * K + p.seg.slot_T % width)
        first += G
    valid_GK = torch.cat([_widen(p.seg.valid_GK, K) for p in parts])
    together: dict[str, Any] = {"best_first": parts[0].best_first, "progress": parts[0].progress}
    for name in (*_TOKENS, *_GROUPS, *_GRIDS):
        found = [getattr(p, name) for p in parts]
        if any(t is None for t in found):
            together[name] = None
            continue
        if name in _GRIDS:
            found = [_widen(t, K) for t in found]
        together[name] = torch.cat(_as_wide(found))
    for name in _NAMED:
        widen = name == "response_columns"
        given = [{k: _widen(t, K) if widen else t for k, t in getattr(p, name).items()} for p in parts]
        together[name] = {k: torch.cat([g[k] for g in given]) for k in given[0]}
    return HeadInput(Segments(torch.cat(slots), valid_GK), **together)


def _widen(t: Tensor, K: int) -> Tensor:
    """(G, k, ...) -> (G, K, ...), zeros behind."""
    return torch.cat([t, t.new_zeros(t.shape[0], K - t.shape[1], *t.shape[2:])], 1)


def _as_wide(found: Sequence[Tensor]) -> list[Tensor]:
    """(T, m) of several m as (T, M): places that no teacher scored hold -inf."""
    if found[0].dim() != 2 or len({t.shape[1] for t in found}) == 1:
        return list(found)
    M = max(t.shape[1] for t in found)
    return [pad(t, (0, M - t.shape[1]), value=-torch.inf) for t in found]


def for_other_rows(term: Term, state: State, rows: int) -> State:
    """A head's state beside data of other rows (evaluation): what it keeps per row starts anew."""
    one, two = term.head.state(1), term.head.state(2)
    fresh = term.head.state(rows)
    return {k: t if one[k].shape == two[k].shape else fresh[k].to(t.device) for k, t in state.items()}


@dataclass(frozen=True)
class Share:
    """A micro-batch's part of a step whose loss was taken over all its groups."""

    x: HeadInput  # without gradient
    grad: Mapping[str, Tensor]  # d objective / d signal, in the micro-batch's order
    value: Tensor  # the step's objective, divided by the micro-batches of a rank

    def loss(self, new: Mapping[str, Tensor], world: int) -> Tensor:
        """A scalar whose gradient, averaged over ranks and added up over micro-batches, is the step's, and so is its
        value. `new`: the same signals, with their graph."""
        pulls = [(new[name] * g).sum() for name, g in self.grad.items()]
        total = torch.stack(pulls).sum()
        return world * (total - total.detach()) + self.value


@dataclass(frozen=True)
class Whole:
    """What a step's groups gave together."""

    x: HeadInput  # of all ranks, without gradient
    parts: Parts
    shares: tuple[Share, ...]  # of this rank's micro-batches


def whole(
    terms: Sequence[Term], mine: Sequence[HeadInput], counts: Mapping[Scope, float], states: Sequence[State] = ()
) -> Whole:
    """Every rank calls it with its micro-batches; all get the same objective and states, each its own shares."""
    device = mine[0].policy_T.device
    ranks = gather([moved(x, "cpu") for x in mine])
    x = moved(join([x for xs in ranks for x in xs]), device)
    leaves = {name: t.requires_grad_(True) for name, t in signals(x).items()}
    with torch.enable_grad():
        parts = objective(terms, with_signals(x, leaves), counts, states)
        grads = torch.autograd.grad(parts.loss, list(leaves.values()), allow_unused=True)
    used = {name: g for name, g in zip(leaves, grads) if g is not None}
    lengths = [[x.policy_T.numel() for x in xs] for xs in ranks]
    start = sum(sum(n) for n in lengths[: rank()])
    value = parts.loss.detach() / len(mine)
    shares = []
    for x_own, n in zip(mine, lengths[rank()]):
        cut = {name: g[start : start + n] for name, g in used.items()}
        shares.append(Share(moved(x_own, device), cut, value))
        start += n
    return Whole(moved(x, device), parts, tuple(shares))

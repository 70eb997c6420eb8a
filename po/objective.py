"""A weighted sum of heads, each over its own count of units. The only place in the package that averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from po.spec import Term
from po.types import HeadInput, HeadOutput, Needs, Unit

Scope = tuple[Unit, bool]  # the unit, and whether only the best response of each group counts


def scope(needs: Needs) -> Scope:
    """What a head's loss is averaged over."""
    return needs.unit, needs.layout == "best"


def counted(x: HeadInput, over: Scope) -> Tensor:
    """Which units of a micro-batch count: a bool mask of the unit's shape, (G,), (G, K) or (T,)."""
    unit, best = over
    at_GK = x.best_GK if best else x.seg.valid_GK
    match unit:
        case "group":
            return at_GK.any(-1)
        case "response":
            return at_GK
        case "token":
            return x.seg.spread(at_GK)


@dataclass(frozen=True)
class Parts:
    """One micro-batch's share of the step's objective, and what each head said."""

    loss: Tensor  # scalar, with gradient: micro-batches and ranks add up to the step's objective
    outputs: tuple[HeadOutput, ...]  # per term, un-reduced
    masks: tuple[Tensor, ...]  # per term, which units count


def objective(
    terms: Sequence[Term],
    x: HeadInput,
    counts: Mapping[Scope, float],
    states: Sequence[Mapping[str, Tensor]] = (),
) -> Parts:
    """Sum over terms of weight * (sum of the micro-batch's un-reduced losses) / (units in the whole step, all ranks).

    states: what each term's head remembers. A head sees its own gates alone: those of term i are called "i.NAME".
    Raises ValueError where a head's loss has not the shape of its declared unit.
    """
    total = x.policy_T.new_zeros(())
    outputs, masks = [], []
    for i, term in enumerate(terms):
        over = scope(term.head.needs)
        own, old = (
            {name.partition(".")[2]: g for name, g in gates.items() if name.startswith(f"{i}.")}
            for gates in (x.gates, x.old_gates)
        )
        out = term.head(replace(x, gates=own, old_gates=old, state=states[i] if states else {}))
        mask = counted(x, over)
        if out.loss.shape != mask.shape:
            raise ValueError(
                f"head {type(term.head).__name__} declares unit={over[0]!r}, so its loss must have shape "
                f"{tuple(mask.shape)}; got {tuple(out.loss.shape)}"
            )
        total = total + term.weight * torch.where(mask, out.loss, 0).sum() / max(counts[over], 1.0)
        outputs.append(out)
        masks.append(mask)
    return Parts(total, tuple(outputs), tuple(masks))

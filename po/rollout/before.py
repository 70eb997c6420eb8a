"""What the policy that sampled a round says of it, for steps that are taken after its weights have changed.

Kept with the checkpoints in the middle of a round: the weights that say it are gone by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from po.batch import Batch
from po.forward import Forward, evaluating
from po.ranks import rank

_GATE = "gate."


class Before(NamedTuple):
    """Of a round, what there was to say of each micro-batch of this rank."""

    round: int
    said: tuple[dict[str, Tensor], ...]


@torch.no_grad()
def look(model: nn.Module, batch: Batch, forward: Forward) -> Batch:
    """The batch with what the policy says of it before it is trained on it."""
    with evaluating(model):
        return forward(model, batch.to(next(model.parameters()).device)).batch


def recalled(batch: Batch, said: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch as `look` left it."""
    here = {name: t.to(device) for name, t in said.items()}
    gates = {name.removeprefix(_GATE): t for name, t in here.items() if name.startswith(_GATE)}
    return replace(batch.to(device), old_T=here.get("old_T"), ref_T=here.get("ref_T"), old_gates=gates)


def save(folder: Path, number: int, batches: Sequence[Batch]) -> None:
    """Write what `look` found on this rank's micro-batches of a round. OSError where the disk is full."""
    flat = {f"{m}.{name}": t.cpu().clone() for m, b in enumerate(batches) for name, t in _said(b)}
    save_file(flat, _file(folder), {"round": str(number), "batches": str(len(batches))})


def load(folder: Path) -> Before | None:
    """What `save` wrote; None for a checkpoint without it."""
    if not _file(folder).is_file():
        return None
    with safe_open(_file(folder), "pt") as file:
        about = file.metadata()
        said: tuple[dict[str, Tensor], ...] = tuple({} for _ in range(int(about["batches"])))
        for key in file.keys():  # noqa: SIM118 -- not a mapping
            m, _, name = key.partition(".")
            said[int(m)][name] = file.get_tensor(key)
    return Before(int(about["round"]), said)


def _said(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for name in ("old_T", "ref_T"):
        if (found := getattr(batch, name)) is not None:
            yield name, found
    for name, gate_T in batch.old_gates.items():
        yield _GATE + name, gate_T


def _file(folder: Path) -> Path:
    return folder / f"round.rank{rank()}.safetensors"

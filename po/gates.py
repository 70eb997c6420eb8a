"""The trainable modules of heads (`Head.build`) under the policy: part of the network that is wrapped, and kept apart.

They hang on the causal language model itself, below PEFT, DDP and DeepSpeed, and run inside its scoring forward
(`Want.gates`), so that gradients are exchanged and ZeRO partitions them as it does everything else. They are attached
after PEFT has wrapped the model: no adapter takes them for a target and nothing freezes them. Neither an adapter's nor
a model's files ever contain them: they have a file of their own.

    gates = attach(policy, recipe.loss, reference)    # before the Trainer wraps the policy; None where no head builds
    score(model, stream, Want(gates=True, ref_hidden_TLD=...)).gates        # {"i.NAME": (T,)}, i the term's index
    save_gates(model, folder); load_gates(model, folder)        # on every rank (ZeRO-3 gathers)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from po.adapter import fp32_beside
from po.errors import UserError
from po.logprob import GATES, layers
from po.spec import Term

FILE = "gates.safetensors"
WEIGHT_DECAY = 0.01  # SparsePO's, for its masks


class Gates(nn.Module):
    """The modules by term: those that read the policy's hidden states and those that read the reference's."""

    def __init__(self, policy: Mapping[int, nn.Module], ref: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.policy = nn.ModuleDict({str(i): m for i, m in policy.items()})
        self.ref = nn.ModuleDict({str(i): m for i, m in ref.items()})

    @property
    def reads_policy(self) -> bool:
        """Whether the policy's hidden states are needed."""
        return len(self.policy) > 0

    @property
    def reads_ref(self) -> bool:
        """Whether the reference's hidden states are needed."""
        return len(self.ref) > 0

    def forward(self, policy_TLD: Tensor | None, ref_TLD: Tensor | None) -> dict[str, Tensor]:
        """{"i.NAME": (T,)}, in fp32 (float64 stays), outside of autocast. A module is given its own dtype."""
        out: dict[str, Tensor] = {}
        for modules, hidden_TLD in ((self.policy, policy_TLD), (self.ref, ref_TLD)):
            for i, module in modules.items():
                assert hidden_TLD is not None, "gates read hidden states that the forward was not given"
                own = next((p.dtype for p in module.parameters()), hidden_TLD.dtype)
                with torch.autocast(hidden_TLD.device.type, enabled=False):
                    made = module(hidden_TLD.to(own))
                out |= {f"{i}.{name}": g.to(torch.promote_types(g.dtype, torch.float32)) for name, g in made.items()}
        return out


def attach(policy: Any, terms: Sequence[Term], reference: Any = None) -> Gates | None:
    """Build the terms' modules and hang them on the policy, trainable. None where no head has any.

    reference: the network whose hidden states the heads with hidden="ref" read; None where it is the policy with its
    adapter off (or a copy of the same sizes). Takes from the random state what the modules take to initialise.
    """
    built: dict[str, dict[int, nn.Module]] = {"policy": {}, "ref": {}}
    for i, term in enumerate(terms):
        kind = term.head.needs.hidden
        if kind is None:
            continue
        module = term.head.build(*sizes(policy if kind == "policy" or reference is None else reference))
        assert module is not None, f"{type(term.head).__name__} needs hidden={kind!r} and builds no module"
        built[kind][i] = module
    if not any(built.values()):
        return None
    base = _base(policy)
    gates = Gates(**built)
    weights = next(base.parameters())
    dtype = torch.promote_types(base.dtype, torch.float32) if fp32_beside(base) else base.dtype
    setattr(base, GATES, gates.to(weights.device, dtype))
    kept_apart = {f"{GATES}.{name}" for name in gates.state_dict()}
    base._keys_to_ignore_on_save = {*(base._keys_to_ignore_on_save or ()), *kept_apart}
    return gates


def sizes(model: Any) -> tuple[int, int]:
    """Hidden size, and how many hidden states there are: those of the embeddings and of each layer."""
    try:
        count = len(layers(_base(model)))
    except ValueError as e:
        raise UserError(f"model.name_or_path: {e}, and a head of the recipe reads them") from e
    return int(model.config.get_text_config().hidden_size), count + 1


def gates_of(model: Any) -> Gates | None:
    """The gates of a policy, wrapped in anything or not."""
    found: Gates | None = getattr(_base(model), GATES, None)
    return found


def save_gates(model: Any, folder: Path, write: bool = True) -> None:
    """Write their parameters and buffers into `folder`; nothing where there are none. Call it on every rank, with
    `write` on one of them."""
    from safetensors.torch import save_file

    gates = gates_of(model)
    if gates is None or not gates.state_dict():
        return
    with _whole(gates.parameters()):
        if write:
            save_file({k: v.detach().cpu().clone() for k, v in gates.state_dict().items()}, folder / FILE)


def load_gates(model: Any, folder: Path) -> None:
    """Read back what `save_gates` wrote. Raises UserError where the file is missing or of other heads."""
    from safetensors.torch import load_file

    gates = gates_of(model)
    if gates is None or not gates.state_dict():
        return
    if not (folder / FILE).is_file():
        raise UserError(f"{folder / FILE} is missing: a checkpoint of this recipe holds the modules of its heads there")
    stored = load_file(folder / FILE)
    with _whole(gates.parameters(), change=True):
        own, found = ({(k, v.shape) for k, v in x.items()} for x in (gates.state_dict(), stored))
        if differ := sorted(k for k, _ in own ^ found):
            raise UserError(f"{folder / FILE}: {differ[0]!r} does not fit; other heads or another model saved it")
        gates.load_state_dict(stored)


def apart(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters to an optimizer group of their own: the recipe's learning rate, WEIGHT_DECAY."""
    own = list(parameters)
    if not own:
        return
    ids = {id(p) for p in own}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    optimizer.add_param_group({"params": own, "weight_decay": WEIGHT_DECAY})


def _base(model: Any) -> Any:
    """The causal language model below DDP, DeepSpeed and PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DeepSpeed passes attributes on, so they tell nothing
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _whole(parameters: Iterable[nn.Parameter], change: bool = False) -> AbstractContextManager[Any]:
    """Parameters in full where ZeRO-3 has partitioned them."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    rank = 0 if change else None  # whose values count afterwards
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(split, modifier_rank=rank)
    return gathered

"""The policy's weights as a server of its base model takes them: named as in the base's files, adapters merged."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from po.errors import UserError
from po.logprob import GATES
from po.unwrap import unwrapped


class Served(NamedTuple):
    """One tensor of the served model: its name there, the parameter, and the LoRA layer around it, if any."""

    name: str
    parameter: nn.Parameter
    layer: Any

    def shape(self) -> list[int]:
        return list(getattr(self.parameter, "ds_shape", self.parameter.shape))

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Gathered under ZeRO-3, the adapter merged. The model is left bit for bit as it was: merging is one layer at
        a time, in a copy, because taking an adapter out again rounds."""
        with _whole([self.parameter] if self.layer is None else list(self.layer.parameters())):
            if self.layer is None:
                return self.parameter.data
            before = self.parameter.data.clone()
            self.layer.merge()
            merged = self.parameter.data.clone()
            self.layer.unmerge()
            self.parameter.data.copy_(before)
            return merged


def served(model: Any) -> list[Served]:
    """All weights as the base model's own files name them. Raises UserError for 4-bit weights."""
    model = unwrapped(model)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "merge") and hasattr(m, "base_layer")}
    out = []
    for name, p in model.named_parameters():
        if "lora_" in name or "original_module" in name or GATES in name.split("."):
            continue
        if not p.dtype.is_floating_point:
            raise UserError("rollout.server: 4-bit weights cannot be sent to vLLM; set model.load_in_4bit: false")
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        plain = (
            name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save.default.", "")
        )
        out.append(Served(plain, p, layer))
    return out


def _whole(parameters: list[nn.Parameter]) -> Any:
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)

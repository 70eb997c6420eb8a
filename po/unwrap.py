"""What lies below the wrappers of distributed training."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The PEFT or transformers model below DDP, DeepSpeed and the like; PEFT passes its attributes on."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DeepSpeed passes attributes on, so they tell nothing
        model = model.module
    return model

"""A backward pass that is not the last of its micro-batch: gradients are added up and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn


def accumulate(accelerator: Any, model: nn.Module, part: Callable[[], Tensor]) -> None:
    """Forward and backward of a part of a micro-batch's loss, without an exchange between ranks or a step."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    state = accelerator.gradient_state
    sync = state.sync_gradients
    state._set_sync_gradients(False)  # accelerate's wrapper of DeepSpeed goes by it
    try:
        with nullcontext() if deepspeed else accelerator.no_sync(model):
            accelerator.backward(part(), **({"scale_wrt_gas": False} if deepspeed else {}))  # as Trainer calls it
    finally:
        state._set_sync_gradients(sync)

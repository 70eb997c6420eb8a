"""DeepSpeed, told two things: load no code from a checkpoint, and leave nothing in /dev/shm."""

from __future__ import annotations

from typing import Any

import torch


def refuse_pickles() -> None:
    """Make DeepSpeed read checkpoints without running code from them: a file that carries any raises UnpicklingError.

    transformers does the same for optimizer.pt, scheduler.pt and the RNG files; weights are safetensors. Call it before
    a checkpoint is loaded.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, set])

    def load(self: Any, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    TorchCheckpointEngine.load = load


def keep_shm_clean() -> None:
    """Switch DeepSpeed's shared-memory collectives off, so that gloo carries them: on a CPU they leave 69 MB per rank
    and run in /dev/shm. Call it before the process group is made; on a GPU it changes nothing."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

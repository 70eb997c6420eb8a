"""DeepSpeed configurations by name, as files or as mappings.

No preset has an optimizer or a scheduler: the Trainer makes them from `train:`, so that ZeRO changes where numbers live
and not which numbers there are. "auto" is filled in by transformers from TrainingArguments.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from po.errors import UserError, suggest

_CPU = {"device": "cpu", "pin_memory": True}
_STAGE: dict[int, dict[str, Any]] = {
    0: {},
    1: {"overlap_comm": True, "contiguous_gradients": True},
    2: {"overlap_comm": True, "contiguous_gradients": True},
    3: {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def _preset(number: int, **offload: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": number, **_STAGE[number], **offload},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "zero0": _preset(0),
    "zero1": _preset(1),
    "zero2": _preset(2),
    "zero3": _preset(3),
    "zero2_offload": _preset(2, offload_optimizer=_CPU),
    "zero3_offload": _preset(3, offload_optimizer=_CPU, offload_param=_CPU),
}

# DeepSpeed's fields that transformers compares with TrainingArguments, late, when the model is already loaded.
MIRRORED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}


def deepspeed_config(value: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A preset's name, a JSON file or a mapping -> DeepSpeed's configuration; None -> None (plain DDP).

    Raises UserError for an unknown name, an unreadable file, and a configuration with its own optimizer or scheduler.
    """
    if value is None:
        return None
    if isinstance(value, str):
        config = copy.deepcopy(PRESETS[value]) if value in PRESETS else _read(value)
    else:
        config = copy.deepcopy(dict(value))
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise UserError(
                f"deepspeed: the configuration has its own {name!r}, which would overrule `train:` (learning_rate, "
                f"optim, lr_scheduler_type, warmup_steps). Remove it: po's Trainer makes the {name}"
            )
    _check_stage(config)
    return config


def _check_stage(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping) or zero.get("stage", 0) not in (0, 1, 2, 3):
        found = zero.get("stage") if isinstance(zero, Mapping) else zero
        raise UserError(f"deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, got {found!r}")


def _read(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    presets = ", ".join(PRESETS)
    if not path.is_file():
        near = suggest(path.stem.replace("ds_", "").replace("z3", "zero3").replace("z2", "zero2"), PRESETS)
        raise UserError(f"deepspeed: there is no preset and no file {name!r}.{near} Presets: {presets}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"deepspeed: {name}: expected DeepSpeed's JSON: {e}. Presets: {presets}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {name}: expected a JSON object, got {type(config).__name__}. Presets: {presets}")
    return config


def stage(value: str | Mapping[str, Any] | None) -> int:
    """The ZeRO stage of what a recipe says at `deepspeed`; 0 without DeepSpeed. Raises as `deepspeed_config`."""
    config = deepspeed_config(value)
    return 0 if config is None else int(config.get("zero_optimization", {}).get("stage", 0))

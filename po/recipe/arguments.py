"""The recipe's `train:` section: the fields of transformers.TrainingArguments that po honours, and po's defaults.

What po does itself is refused here with the place where it belongs, so that no line of a recipe is ignored.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Lt

from po.errors import UserError, suggest
from po.recipe.fields import MisfitError, fit
from po.recipe.report import Report
from po.spec import Recipe
from po.zero import deepspeed_config

_PO_BATCHES = "po makes the batches itself"
_PO_EVALUATES = "po evaluates by itself: loss, rewards and accuracies, exact over batches and ranks"
_PO_DISTRIBUTES = "po distributes with plain DDP or `deepspeed:` at the top level of the recipe"
_UNTESTED = "po's packed prompts are not verified with it"
_HUB = "export the run (`po export`) and upload the folder"

# Fields of TrainingArguments that a recipe may not set, and what to do instead.
OWNED: dict[str, str] = {
    "output_dir": "belongs at the top level of the recipe",
    "deepspeed": "belongs at the top level of the recipe",
    "seed": "belongs at the top level of the recipe",
    "resume_from_checkpoint": "write `resume: true` at the top level of the recipe",
    "remove_unused_columns": _PO_BATCHES,
    "label_names": _PO_BATCHES,
    "dataloader_drop_last": _PO_BATCHES + " and trains on every row",
    "dataloader_persistent_workers": _PO_BATCHES,
    "dataloader_prefetch_factor": _PO_BATCHES,
    "dataloader_multiprocessing_context": _PO_BATCHES,
    "dataloader_in_order": _PO_BATCHES,
    "accelerator_config": _PO_BATCHES,
    "include_num_input_tokens_seen": "po logs num_tokens and perf/tokens_per_s always",
    "auto_find_batch_size": "it changes the objective in silence; lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps by the same factor",
    "average_tokens_across_devices": "po's averages are exact over ranks always",
    "ignore_data_skip": "po resumes at the exact row",
    "save_only_model": "a checkpoint that cannot be resumed is an export: `po export`",
    "label_smoothing_factor": "it is for classifiers; write it in the loss: `{head: dpo, label_smoothing: 0.1}`",
    "logging_nan_inf_filter": "po stops at the first NaN or Inf",
    "use_cpu": "po uses the CPU where there is no accelerator; DS_ACCELERATOR=cpu in the environment forces it",
    "local_rank": "the launcher sets it",
    "do_train": "`po train` trains",
    "do_eval": "name the rows at data.eval",
    "do_predict": "po has no prediction loop",
    "prediction_loss_only": _PO_EVALUATES,
    "eval_do_concat_batches": _PO_EVALUATES,
    "eval_use_gather_object": _PO_EVALUATES,
    "eval_accumulation_steps": _PO_EVALUATES,
    "include_for_metrics": _PO_EVALUATES,
    "batch_eval_metrics": _PO_EVALUATES,
    "bf16_full_eval": _PO_EVALUATES + "; the dtype of the weights is model.dtype",
    "fp16_full_eval": _PO_EVALUATES + "; the dtype of the weights is model.dtype",
    "torch_compile": _UNTESTED,
    "torch_compile_backend": _UNTESTED,
    "torch_compile_mode": _UNTESTED,
    "use_liger_kernel": "po has its own log-prob routine",
    "liger_kernel_config": "po has its own log-prob routine",
    "use_cache": "training reads no cache",
    "neftune_noise_alpha": "noise on the embeddings makes the policy differ from its reference at step 0",
    "length_column_name": "po packs sequences without padding",
    "fsdp": _PO_DISTRIBUTES,
    "fsdp_config": _PO_DISTRIBUTES,
    "parallelism_config": _PO_DISTRIBUTES,
    "push_to_hub": _HUB,
    "hub_token": _HUB + "; put tokens into the environment (HF_TOKEN): a recipe is copied into the run's folder",
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

# The deprecated twins of activation_checkpointing(_kwargs): `aliases` renames them.
_TWINS = ("gradient_checkpointing", "gradient_checkpointing_kwargs")

# What TrainingArguments checks late or not at all. None of bf16 and fp16: by the dtype of the weights.
_SHARE = Annotated[float, Ge(0), Lt(1)]
_HINTS: dict[str, Any] = {
    "per_device_train_batch_size": Annotated[int, Ge(1)],
    "per_device_eval_batch_size": Annotated[int, Ge(1)],
    "gradient_accumulation_steps": Annotated[int, Ge(1)],
    "num_train_epochs": Annotated[float, Gt(0)],
    "learning_rate": Annotated[float, Gt(0)],
    "warmup_steps": Annotated[float, Ge(0)],
    "weight_decay": Annotated[float, Ge(0)],
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Annotated[float, Gt(0)],
    "max_grad_norm": Annotated[float, Ge(0)],
    "logging_steps": Annotated[float, Gt(0)],
    "eval_steps": Annotated[float, Gt(0)] | None,
    "save_steps": Annotated[float, Gt(0)],
    "save_total_limit": Annotated[int, Ge(1)] | None,
    "dataloader_num_workers": Annotated[int, Ge(0)],
    "ddp_timeout": Annotated[int, Ge(1)],
    "bf16": bool | None,
    "fp16": bool | None,
}


@cache
def known() -> dict[str, Any]:
    """The fields of TrainingArguments that a recipe may set, with their annotated types."""
    from transformers import TrainingArguments

    types = get_type_hints(TrainingArguments, include_extras=True)
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    return {n: _HINTS.get(n, types[n]) for n in names if n not in OWNED and n not in _TWINS}


def defaults(lora: bool, evaluates: bool) -> dict[str, Any]:
    """The value of every field that the recipe leaves out: transformers' own, but for these few.

    learning_rate: 1e-6 for all weights (TRL's for DPO), 1e-5 for LoRA. One epoch. A log line each 10 steps.
    bf16, fp16: None, which `training_arguments` settles by the dtype of the weights.
    """
    from transformers import TrainingArguments

    out: dict[str, Any] = {}
    for f in dataclasses.fields(TrainingArguments):
        if f.name in known():
            out[f.name] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return out | {
        "learning_rate": 1e-5 if lora else 1e-6,
        "num_train_epochs": 1.0,
        "logging_steps": 10,
        "eval_strategy": "epoch" if evaluates else "no",
        "report_to": "none",
        "disable_tqdm": False,
        "bf16": None,
        "fp16": None,
    }


def check(raw: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The values of `train:` that are right, coerced to their fields' types; the others are reported.

    A null asks for the default, as if the line were not there.
    """
    out = {}
    for key, value in raw.items():
        at = ("train", key)
        if key in OWNED:
            report.wrong(at, f"is not for the recipe's `train`: {OWNED[key]}.")
        elif key not in known():
            near = suggest(key, known())
            report.wrong(at, f"transformers.TrainingArguments has no such field.{near} `po check --schema` lists them.")
        elif value is not None:
            try:
                out[key] = fit(known()[key], value)
            except MisfitError as e:
                report.wrong(at, str(e))
    _check_trackers(out.get("report_to"), report)
    return out


def _check_trackers(report_to: Any, report: Report) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            every = [*INTEGRATION_TO_CALLBACK, "all", "none"]
            report.wrong(
                ("train", "report_to"),
                f"no tracker is called {name!r}.{suggest(name, every)} Known: {', '.join(every)}.",
            )
        elif name not in get_available_reporting_integrations():
            report.wrong(("train", "report_to"), f"the tracker {name!r} is not installed; pip install {name}")


def keep_checkpoints(recipe: Recipe) -> int | None:
    """How many sealed checkpoints po keeps (`train.save_total_limit`); None: all."""
    limit = recipe.train.get("save_total_limit")
    return None if limit is None else int(limit)


def training_arguments(recipe: Recipe) -> Any:
    """transformers.TrainingArguments of a recipe. Build it before the model is loaded: ZeRO-3 is switched on here.

    Unless the recipe says, bf16 (fp16) autocast follows the dtype of the weights. Batch sizes count prompts. po rotates
    the checkpoints, so save_total_limit stays behind (`keep_checkpoints`). Raises UserError where TrainingArguments
    refuses a combination, and where model.dtype is auto and there is no model to look at.
    """
    from transformers import TrainingArguments

    weights = _dtype(recipe)
    adapted = recipe.lora is not None or recipe.model.adapter is not None
    values = defaults(adapted, bool(recipe.data.eval)) | dict(recipe.train)
    chosen = values["bf16"] or values["fp16"]
    for name, of in (("bf16", "bfloat16"), ("fp16", "float16")):
        values[name] = (weights == of and not chosen) if values[name] is None else values[name]
    values |= {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "deepspeed": deepspeed_config(recipe.deepspeed),
        "save_total_limit": None,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": without_accelerator(),
    }
    try:
        return TrainingArguments(**values)
    except ValueError as e:
        raise UserError(f"train: {e}") from None


def _dtype(recipe: Recipe) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    from po.weights import checkpoint_dtype, locate

    return checkpoint_dtype(locate(recipe.model.name_or_path, recipe.model.revision))


def without_accelerator() -> bool:
    """Whether this process computes on the CPU: there is no accelerator, or DS_ACCELERATOR=cpu says so."""
    import torch

    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available()

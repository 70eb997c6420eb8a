"""LoRA by PEFT: a new adapter as the recipe's `lora` says, or an earlier one continued as its own files say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from po.errors import UserError, suggest
from po.spec import LoraSpec, ModelSpec
from po.weights import is_adapter, locate, read_config, weight_files


def add_adapter(net: Any, model: ModelSpec, lora: LoraSpec, task_type: str = "CAUSAL_LM") -> nn.Module:
    """Freeze `net` and put a new adapter on it that changes nothing yet (B = 0).

    An embedding that is also the LM head stays one with it. task_type is PEFT's: SEQ_CLS trains the score head as well.
    Raises UserError for a name that matches no module (PEFT ignores it where another name matches) and for modules that
    LoRA cannot train.
    """
    from peft import LoraConfig, get_peft_model

    _check_names(net, lora)
    config = LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        exclude_modules=list(lora.exclude_modules) if lora.exclude_modules else None,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        ensure_weight_tying=_trains_tied(net, lora),
        revision=model.revision,
    )
    try:
        wrapped: nn.Module = get_peft_model(net, config, autocast_adapter_dtype=fp32_beside(net))
    except (ValueError, TypeError) as e:  # e.g. a norm as a target: PEFT says which
        raise UserError(f"lora: {e}") from e
    return wrapped


def continue_adapter(net: Any, model: ModelSpec, lora: LoraSpec | None) -> nn.Module:
    """Load `model.adapter` onto `net`, trainable. Of `lora`, only the dropout may differ from the adapter's own.

    Raises UserError where the folder is no LoRA adapter, does not fit the base, or contradicts `lora`.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    assert model.adapter is not None
    folder = locate(model.adapter, None, "model.adapter")
    if not is_adapter(folder):
        raise UserError(f"model.adapter: {folder} is not an adapter folder: it has no adapter_config.json")
    (file,) = weight_files(folder, "model.adapter")
    kind = read_config(folder, "model.adapter").get("peft_type")
    if kind != "LORA":
        raise UserError(f"model.adapter: {folder} is a {kind} adapter; expected LORA")
    config = LoraConfig.from_pretrained(str(folder))
    if lora is not None:
        _check_agrees(net, config, lora, folder)
        config.lora_dropout = lora.dropout
    config.base_model_name_or_path, config.revision = net.name_or_path, model.revision
    misfit = f"model.adapter: {folder} does not fit the model {model.name_or_path!r}"
    try:
        wrapped: nn.Module = PeftModel.from_pretrained(
            net, str(folder), is_trainable=True, config=config, autocast_adapter_dtype=fp32_beside(net)
        )
    except (RuntimeError, ValueError) as e:  # another base: sizes or names differ
        first = str(e).splitlines()[:2][-1].strip()
        raise UserError(f"{misfit}: {first}") from e
    with safe_open(file, "pt") as f:
        differ = set(f.keys()) ^ set(get_peft_model_state_dict(wrapped))
    if differ:
        raise UserError(f"{misfit}: {len(differ)} tensors are only in one of them, first {min(differ)!r}")
    return wrapped


def fp32_beside(net: Any) -> bool:
    """Whether what trains beside a 16-bit base is fp32: not under ZeRO-3, which gathers both in one dtype."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return not (is_deepspeed_zero3_enabled() and net.dtype in (torch.bfloat16, torch.float16))


def _selects(words: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: a string is a pattern for the whole name, a list holds names or ends of names."""
    if isinstance(words, str):
        return re.fullmatch(words, name) is not None
    return any(name == word or name.endswith(f".{word}") for word in words)


def _targets(net: Any, words: str | Iterable[str], exclude: str | Iterable[str] | None) -> set[str]:
    """The modules that get an adapter."""
    if words == "all-linear":
        from transformers.pytorch_utils import Conv1D

        head = net.get_output_embeddings()
        found = {n for n, m in net.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    else:
        found = {n for n, _ in net.named_modules() if _selects(words, n)}
    return {n for n in found if not (exclude and _selects(exclude, n))}


def _trains_tied(net: Any, lora: LoraSpec) -> bool:
    """Whether the adapter trains an embedding that is also the LM head."""
    if not net.config.get_text_config().tie_word_embeddings:
        return False
    ends = (net.get_input_embeddings(), net.get_output_embeddings())
    trained = _targets(net, lora.target_modules, lora.exclude_modules) | _targets(net, lora.modules_to_save or (), None)
    return any(name in trained for name, module in net.named_modules() if module in ends)


def _check_names(net: Any, lora: LoraSpec) -> None:
    names = [name for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None]
    short = sorted({name.rpartition(".")[2] for name in names})
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        words = getattr(lora, field)
        if words is None or words == "all-linear":
            continue
        for word in [words] if isinstance(words, str) else words:
            if any(_selects(words if isinstance(words, str) else [word], name) for name, _ in net.named_modules()):
                continue
            raise UserError(
                f"lora.{field}: no module of the model is named {word!r}.{suggest(word, short)} "
                f"It has: {', '.join(short)}"
            )


def _check_agrees(net: Any, config: Any, lora: LoraSpec, folder: Path) -> None:
    def same(field: str, said: Any, found: Any) -> None:
        if said != found:
            raise UserError(
                f"lora.{field}: the recipe says {said}, the adapter that the run continues ({folder}) has {found}. "
                "Leave `lora` out to continue it as it is"
            )

    same("r", lora.r, config.r)
    same("alpha", lora.alpha, float(config.lora_alpha))
    same("use_rslora", lora.use_rslora, config.use_rslora)
    same("use_dora", lora.use_dora, config.use_dora)
    same("modules_to_save", sorted(lora.modules_to_save or ()), sorted(config.modules_to_save or ()))
    mine = _targets(net, lora.target_modules, lora.exclude_modules)
    if mine != _targets(net, config.target_modules, config.exclude_modules):
        found = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
        same("target_modules", lora.target_modules, found)

"""From what a recipe says of a model to a tokenizer and a network ready to train: weights, adapter, no dropout.

The base is frozen where there is an adapter. All dropout of the base is off, so that the policy of step 0 is its
reference exactly; LoRA's own dropout is the recipe's. `fingerprint` (from `weights`) says which weights these are.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from po.adapter import add_adapter, continue_adapter
from po.errors import UserError, suggest
from po.logprob import install
from po.spec import LoraSpec, ModelSpec
from po.weights import checkpoint_dtype, fingerprint, is_adapter, locate, read_config, weight_files

__all__ = ["fingerprint", "load_frozen", "load_policy", "load_tokenizer", "plainly", "tokenizer_key"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer of a model (or of `spec.tokenizer`), with a pad token, and `spec.chat_template` as its template.

    EOS stays what it is: a missing pad token becomes a reserved token of the vocabulary, and only where there is none
    an alias of EOS (masks come from lengths, never from token ids). Raises UserError for a folder that is not there or
    holds no tokenizer, an unreachable hub, and a template that cannot be read or parsed.
    """
    from transformers import AutoTokenizer

    where = "model.name_or_path" if spec.tokenizer is None else "model.tokenizer"
    revision = spec.revision if spec.tokenizer is None else None
    folder = locate(spec.tokenizer or spec.name_or_path, revision, where, weights=False)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{where}: {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        known = [p for p in _PADS if p in vocabulary and p != tokenizer.eos_token]
        unk = [tokenizer.unk_token] if tokenizer.unk_token not in (None, tokenizer.eos_token) else []
        tokenizer.pad_token = [*known, *unk, tokenizer.eos_token][0]
    if spec.chat_template is not None:
        tokenizer.chat_template = _read_template(Path(spec.chat_template).expanduser(), tokenizer)
    return tokenizer


def _read_template(path: Path, tokenizer: Any) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"model.chat_template: there is no file {str(path)!r}.{near} Expected a Jinja template")
    template = path.read_text("utf-8")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as e:
        raise UserError(f"model.chat_template: {path}:{e.lineno}: {e.message}") from e
    except TemplateError:
        pass  # the template refuses this one conversation, which is its right
    return template


def tokenizer_key(tokenizer: Any) -> str:
    """SHA-256 of what decides the token ids: vocabulary, merges, special tokens, template. Never a path.

    Truncation and padding, which calls leave behind in a fast tokenizer, do not count.
    """
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        words: Any = {k: v for k, v in parts.items() if k not in ("truncation", "padding")}
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = sorted(Path(f) for f in tokenizer.save_vocabulary(folder))
            words = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        words["vocabulary"] = tokenizer.get_vocab()
    switches = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens")
    named = {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    content = {
        "kind": type(tokenizer).__name__,
        "words": words,
        "named": {k: str(v) for k, v in named.items()},
        "template": tokenizer.chat_template,
        "switches": {k: getattr(tokenizer, k, None) for k in switches},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def plainly() -> Iterator[None]:
    """Load whole models in here: hides from transformers that DeepSpeed ZeRO-3 would partition them."""
    from transformers.integrations import deepspeed as hf

    alive = hf._hf_deepspeed_config_weak_ref and hf._hf_deepspeed_config_weak_ref()
    hf.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            hf.set_hf_deepspeed_config(alive)


def load_policy(model: ModelSpec, lora: LoraSpec | None, *, activation_checkpointing: bool = False) -> nn.Module:
    """The network that the run trains: a new LoRA adapter, a continued one (`model.adapter`), or all weights.

    On the CPU (4-bit: on this process's GPU), partitioned where ZeRO-3 is on. LoRA's parameters are fp32, except under
    ZeRO-3 with a 16-bit base, which needs one dtype (DeepSpeed keeps the fp32 masters). Raises UserError for weights
    that are missing, module names that match nothing, and a `lora` that contradicts `model.adapter`.
    """
    if model.load_in_4bit and lora is None and model.adapter is None:
        raise UserError("model.load_in_4bit: 4-bit weights cannot be trained; add `lora: {}` to the recipe")
    net: Any = _load_base(model)
    if model.adapter is not None:
        net = continue_adapter(net, model, lora)
    elif lora is not None:
        net = add_adapter(net, model, lora)
    if activation_checkpointing and (lora or model.adapter):
        net.enable_input_require_grads()  # the frozen embedding's output must carry a gradient into checkpoints
    policy: nn.Module = net
    return policy


def load_frozen(model: ModelSpec) -> nn.Module:
    """The same network as a constant: `model` with its adapter (not merged: the policy's numerics), eval, no grad."""
    net: Any = _load_base(model)
    if model.adapter is not None:
        net = continue_adapter(net, model, None)
    frozen: nn.Module = net.requires_grad_(False).eval()
    return frozen


def _load_base(model: ModelSpec) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = locate(model.name_or_path, model.revision)
    if is_adapter(folder):
        raise UserError(
            f"model.name_or_path: {folder} is an adapter. Write its base there and this folder at model.adapter"
        )
    weight_files(folder)
    read_config(folder)
    dtype = getattr(torch, checkpoint_dtype(folder) if model.dtype == "auto" else model.dtype)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    _without_dropout(config)
    quantized = _four_bit(dtype) if model.load_in_4bit else {}
    try:
        net, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **quantized,
        )
    except (ImportError, RuntimeError) as e:
        if not quantized:
            raise
        raise UserError(f"model.load_in_4bit: bitsandbytes does not run on this machine: {e}") from e
    if info["missing_keys"]:
        raise UserError(
            f"model.name_or_path: the weights in {folder} lack {len(info['missing_keys'])} tensors that "
            f"{type(net).__name__} has, first {min(info['missing_keys'])!r}; they would start at random"
        )
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    net.config._name_or_path = net.name_or_path = _portable(model.name_or_path)
    install(net)
    return net


def _portable(name_or_path: str) -> str:
    """A local folder's full path, so that it means the same from any folder; a hub name as it is."""
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.is_dir() else name_or_path


def _without_dropout(config: Any) -> None:
    """Set every dropout rate of a configuration (and of the ones inside it) to 0: some models read it in `forward`."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            _without_dropout(value)
        elif re.search("dropout|pdrop|layerdrop", name) and type(value) in (int, float):
            setattr(config, name, 0.0)


def _four_bit(dtype: torch.dtype) -> dict[str, Any]:
    import importlib.util

    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_4bit: needs the package bitsandbytes; pip install 'po[qlora]'")
    if is_deepspeed_zero3_enabled():
        raise UserError("model.load_in_4bit: ZeRO-3 cannot partition 4-bit weights; use `deepspeed: zero2`")
    compute = torch.bfloat16 if dtype == torch.float32 else dtype
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}

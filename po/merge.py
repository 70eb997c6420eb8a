"""The tensors of an export: read from a run, merged in fp32, written, and read back.

Everything here runs on the CPU in fp32; a cast comes last. No tensor is written or accepted that is empty, NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from po.adapter import continue_adapter
from po.data.rows import Example
from po.errors import NumericsError, UserError
from po.policy import load_policy, plainly
from po.spec import LoraSpec, ModelSpec
from po.weights import locate, weight_files


def load_plain(folder: Path, trust_remote_code: bool = False, dtype: Any = torch.float32) -> Any:
    """A model as anyone loads it: transformers alone, nothing of po installed on it; eval."""
    from transformers import AutoModelForCausalLM

    with plainly():
        net, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors are missing or unknown to {type(net).__name__}: {wrong[0]!r}")
    return net.eval()


def load_trained(model: ModelSpec, folder: Path) -> Any:
    """The run's adapter on its base, unmerged, in fp32, plain PEFT. UserError where they do not fit."""
    net = load_plain(locate(model.name_or_path, model.revision), model.trust_remote_code)
    return continue_adapter(net, ModelSpec(model.name_or_path, model.revision, adapter=str(folder)), None).eval()


def load_shards(model: ModelSpec, lora: LoraSpec | None, folder: Path) -> Any:
    """What a DeepSpeed checkpoint (`latest` and its folder) holds, as the run's network in fp32.

    Raises UserError for a checkpoint with code in it (it is never run) and for one that lacks trained tensors.
    """
    with plainly():
        spec = ModelSpec(model.name_or_path, model.revision, "float32", adapter=model.adapter)
        net: Any = load_policy(spec, lora)
    adapted = lora is not None or model.adapter is not None
    state = _consolidate(folder, adapted)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    if lacking := sorted(trained - set(state)):
        raise UserError(
            f"{folder}: the DeepSpeed checkpoint lacks {len(lacking)} trained tensors, first {lacking[0]!r}"
        )
    refused = net.load_state_dict(state, strict=False).unexpected_keys
    if refused:
        raise UserError(f"{folder}: the DeepSpeed checkpoint is of another model: {refused[0]!r} has no place in it")
    return net.eval()


def _consolidate(folder: Path, trained_only: bool) -> dict[str, Tensor]:
    import pickle

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from po.hardening import refuse_pickles

    refuse_pickles()
    tag = (folder / "latest").read_text("utf-8").strip()
    if Path(tag).name != tag or not (folder / tag).is_dir():
        raise UserError(f"{folder / 'latest'}: names {tag!r}; expected a folder beside it")
    for path in sorted((folder / tag).glob("*.pt")):  # the same bytes are read again below, by code that trusts them
        try:
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as e:
            raise UserError(f"{path}: holds something other than tensors, which could run code; it is not read") from e
    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
        str(folder), tag, exclude_frozen_parameters=trained_only
    )
    return state


def merge(peft_model: Any) -> Any:
    """The base with the adapter's change in its weights, in fp32. NumericsError where that is not finite.

    An LM head that shares its weight with the embedding gets its own copy first where LoRA sits on either, because
    PEFT adds a change to a shared weight once for each; it is shared again where both come out equal.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = peft_model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    layers = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    adapted = any(isinstance(end, BaseTunerLayer) for end in ends)
    shared = adapted and layers[0].weight is layers[1].weight
    if shared:
        layers[1].weight = nn.Parameter(layers[0].weight.detach().clone(), requires_grad=False)
    try:
        net = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as e:
        raise NumericsError(f"merging: {e}") from e
    if shared:
        inner, outer = net.get_input_embeddings(), net.get_output_embeddings()
        if torch.equal(inner.weight, outer.weight):
            outer.weight = inner.weight
        net.config.get_text_config().tie_word_embeddings = outer.weight is inner.weight
    return net


def check_tensors(tensors: Iterable[tuple[str, Tensor]], where: str) -> int:
    """How many tensors there are. UserError for none or an empty one, NumericsError for one with NaN or Inf."""
    n = 0
    for name, tensor in tensors:
        n += 1
        if tensor.numel() == 0:
            raise UserError(
                f"{where}: the tensor {name!r} is empty (shape {list(tensor.shape)}): ZeRO-3 shards were saved without "
                "gathering them. Export from a checkpoint-N that still has its global_step folder"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise NumericsError(f"{where}: the tensor {name!r} has {bad} NaN or Inf among its {tensor.numel()} values")
    if n == 0:
        raise UserError(f"{where}: holds no tensors; the run saved an empty file. Export from a checkpoint-N instead")
    return n


def each_tensor(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model or adapter folder by name in its files, one in memory at a time."""
    for path in weight_files(folder, str(folder)):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                yield name, f.get_tensor(name)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model or adapter folder."""
    return dict(each_tensor(folder))


def check_equal(written: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """The same names, shapes, dtypes and bits; NumericsError naming the first that differs."""
    for name in sorted(set(written) | set(expected)):
        if name not in written or name not in expected:
            state = "is missing" if name not in written else "should not be there"
            raise NumericsError(f"{where}: read back, the tensor {name!r} {state}")
        got, want = written[name], expected[name]
        if got.shape != want.shape or got.dtype != want.dtype or not torch.equal(got, want):
            raise NumericsError(f"{where}: read back, the tensor {name!r} is not what was written")


@torch.no_grad()
def log_probs(net: Any, examples: Sequence[Example]) -> Tensor:
    """log p(y_t | x, y_<t) of every response token, one plain forward per response, (T,) fp32 on the CPU."""
    device = next(net.parameters()).device
    out = []
    for example in examples:
        for response in example.response_ids:
            ids = torch.tensor([[*example.prompt_ids, *response]], device=device)
            logits_RV = net(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1].float()
            target_R = torch.tensor(response, device=device)
            out.append(logits_RV.log_softmax(-1).gather(-1, target_R[:, None])[:, 0].cpu())
    return torch.cat(out)

"""Whether a model may share a prompt between its responses: what its config says, and what its numbers say.

`problem` reads the architecture before anything runs; `verify` compares the first batch with plain forwards, so that a
model nobody has tried is refused rather than scored wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from po.attention import NAME, Layers, watch
from po.errors import NumericsError
from po.forest import Forest, Padded
from po.logprob import score

_ATTENTION = {"full_attention", "sliding_attention"}
_PLAIN_FORWARDS = 4  # responses that `verify` compares; the same on every rank, since ZeRO-3's forwards are collective

# Largest accepted |difference| of a token's log-prob, by the dtype in which the model computes its logits. RMSNorm
# rounds to fp32 in float64 models too. Measured: docs/numerics.md.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
_ADVICE = "Set model.share_prefix: false (each response then carries its own copy of the prompt)"


def share(model: Any) -> None:
    """Let a model take packed streams: set its attention to po's. Raises NumericsError where that has no effect."""
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise NumericsError(f"{type(model).__name__} does not let its attention be set. {_ADVICE}")


def problem(model: Any, max_length: int | None = None) -> str | None:
    """Why a transformers causal language model cannot share a prompt between responses, or None if nothing is known
    against it. max_length: the longest prompt and response of the run, in tokens.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(model, "_is_stateful", False) or getattr(config, "layers_block_type", None):
        return "it has recurrent layers, whose state runs on from one response into the next"
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}, which po's attention does not compute"
    if getattr(config, "attention_chunk_size", None):
        return "it has chunked attention, which po's attention does not compute"
    if any(name.rpartition(".")[2] in ("sinks", "s_aux") for name, _ in model.named_parameters()):
        return "it has attention sinks, which po's attention does not compute"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "absolute") not in _POSITIONS:
        return "it encodes positions as a bias on attention scores"
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "its attention is not causal"
    plain = model._supports_sdpa or getattr(config, "attn_logit_softcapping", None)
    if not model._can_set_attn_implementation() or not plain:
        return "its code does not take its attention from transformers' AttentionInterface"
    if "position_ids" not in signature(type(model.base_model).forward).parameters:
        return "its code does not take position_ids"
    return _growing_rope(config, max_length)


_POSITIONS = ("absolute", "rope", "rotary")


def _growing_rope(config: Any, max_length: int | None) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            if max_length is None or max_length > limit:
                return (
                    f"its rotary embedding ({kind}) depends on the longest sequence of a batch once that exceeds "
                    f"{limit} tokens"
                )
    return None


@torch.no_grad()
def verify(model: nn.Module, stream: Forest | Padded, tolerance: float | None = None) -> float:
    """Score a stream and compare a few of its responses with plain forwards of the model through its own LM head.

    `model` is what the trainer holds, wrapped or not, and in eval mode. Returns the largest |difference| of a
    response token's log-prob. Raises NumericsError when it exceeds `tolerance` (None: by dtype), when the stream does
    not reach every attention layer, or when a sliding window of the config does not.
    """
    with watch() as layers:
        logp_T = score(model, stream).logp_T
    inner = _unwrapped(model)
    if isinstance(stream, Forest) and (found := _unreached(inner.config.get_text_config(), layers)):
        raise NumericsError(f"start-up check of the packed stream: {found}. {_ADVICE}")
    rows = list(_sequences(stream))
    picked = [rows[i * (len(rows) - 1) // (_PLAIN_FORWARDS - 1)] for i in range(_PLAIN_FORWARDS)]
    with _logit_dtype(inner) as dtypes:
        gaps = [_gap(model, logp_T, *row) for row in picked]
    gap = max(gaps)
    tolerance = _TOLERANCE[dtypes[-1]] if tolerance is None else tolerance
    if not gap <= tolerance:
        what = "the packed stream" if isinstance(stream, Forest) else "padded rows"
        advice = _ADVICE if isinstance(stream, Forest) else "po cannot score this model"
        raise NumericsError(
            f"start-up check of {what}: log-probs differ from a plain forward of {type(inner).__name__} by up to "
            f"{gap:.2g} per token; expected at most {tolerance:g} in {dtypes[-1]}. {advice}"
        )
    return gap


def _gap(model: nn.Module, logp_T: Tensor, ids_L: Tensor, target_R: Tensor, start: int) -> float:
    n = target_R.numel()
    accepts = signature(type(_unwrapped(model)).forward).parameters
    keep = {"logits_to_keep": n} if "logits_to_keep" in accepts else {}
    logits_RV = model(input_ids=ids_L[None], use_cache=False, **keep).logits[0, -n:]
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    plain_R = logits_RV.log_softmax(-1).gather(-1, target_R[:, None])[:, 0]
    return float((plain_R - logp_T[start : start + n]).abs().max())


def _sequences(stream: Forest | Padded) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(what a response's tokens see, the response's tokens, where these begin in T) of every response."""
    start = 0
    if isinstance(stream, Forest):
        for tree in stream.trees:
            for s, e in tree.branches:
                ids_L = torch.cat((stream.input_S[slice(*tree.trunk)], stream.input_S[s:e]))
                yield ids_L, stream.target_T[start : start + e - s], start
                start += e - s
        return
    row_T = stream.at_T // stream.input_NL.shape[1]
    for n, length in enumerate(stream.mask_NL.sum(-1).tolist()):
        count = int((row_T == n).sum())
        yield stream.input_NL[n, :length], stream.target_T[start : start + count], start
        start += count


def _unreached(config: Any, layers: Layers) -> str | None:
    """What of the architecture the packed forward did not see."""
    total = config.num_hidden_layers
    if len(layers) < total:
        return f"it reached {len(layers)} of {total} layers"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    expected = [window is not None] * total if kinds is None else [k == "sliding_attention" for k in kinds]
    for layer, (slides, given) in enumerate(zip(expected, layers.values())):
        if slides and given is None:
            return f"layer {layer} has a sliding window by the config, but its attention is not told so"
    return None


@contextmanager
def _logit_dtype(model: Any) -> Iterator[list[torch.dtype]]:
    """The dtype of the LM head's output, which autocast may lower below the weights' own."""
    dtypes: list[torch.dtype] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    try:
        yield dtypes
    finally:
        hook.remove()


def _unwrapped(model: Any) -> Any:
    """The transformers model below DDP, DeepSpeed and the like; PEFT passes its attributes on."""
    while isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "get_output_embeddings"):
        model = model.module
    return model

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

from po.attention import NAME, Seen, watch
from po.errors import NumericsError, UserError
from po.forest import Forest, Padded
from po.logprob import score
from po.unwrap import unwrapped

_ATTENTION = {"full_attention", "sliding_attention"}
_PLAIN_FORWARDS = 4  # responses that `verify` compares; the same on every rank, since ZeRO-3's forwards are collective

# Largest accepted |difference| of a token's log-prob, by the dtype in which the model computes its logits. RMSNorm
# rounds to fp32 in float64 models too. Measured: docs/numerics.md.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.2}
_ADVICE = "Set model.share_prefix: false (each response then carries its own copy of the prompt)"


# What transformers' families were found to do differently, each by comparing its log-probs (docs/numerics.md).
_DIFFERS = {
    "doge": "its attention builds on the attention mask itself",
    "nemotron": "its layers do not hand keyword arguments down to their attention",
    "phimoe": "its attention is not told its sliding window",
    "stablelm": "its layers do not hand keyword arguments down to their attention",
}


def share(model: Any) -> None:
    """Let a model take packed streams: set its attention to po's. Raises UserError for a model that cannot share."""
    if reason := problem(model):
        raise UserError(
            f"model.share_prefix: {type(model).__name__} cannot share a prompt between responses: {reason}. "
            "Set it to auto or false (each response then carries its own copy of the prompt)"
        )
    model.set_attn_implementation(NAME)


def problem(model: Any, max_length: int | None = None) -> str | None:
    """Why a transformers causal language model cannot share a prompt between responses, or None if nothing is known
    against it.

    max_length: tokens of the longest prompt and response together. Raises UserError where a response of that length
    would depend on its batch, shared or not.
    """
    _refuse_growing_rope(model, max_length or 0)
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
    if getattr(config, "alibi", False):
        return "it encodes positions as a bias on attention scores"
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "its attention is not causal"
    plain = model._supports_sdpa or getattr(config, "attn_logit_softcapping", None)
    if not model._can_set_attn_implementation() or not plain:
        return "its code does not take its attention from transformers' AttentionInterface"
    if "position_ids" not in signature(type(model.base_model).forward).parameters:
        return "its code does not take position_ids"
    return _DIFFERS.get(config.model_type)


def _refuse_growing_rope(model: Any, max_length: int) -> None:
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        kind = parameters.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_length > limit:
            raise UserError(
                f"data.max_length: got {max_length}, expected at most {limit} for {type(model).__name__}: beyond that "
                f"its rotary embedding ({kind}) changes with the longest sequence of a batch, so that a response's "
                "log-prob would depend on its neighbours"
            )


@torch.no_grad()
def verify(model: nn.Module, stream: Forest | Padded, tolerance: float | None = None) -> float:
    """Score a stream and compare a few of its responses with plain forwards of the model through its own LM head.

    `model` is what the trainer holds, wrapped or not, and in eval mode. Returns the largest |difference| of a
    response token's log-prob. Raises NumericsError when it exceeds `tolerance` (None: by dtype), when the stream does
    not reach every attention layer, or when a sliding window of the config does not.
    """
    rows = list(_sequences(stream))
    picked = [rows[i * (len(rows) - 1) // (_PLAIN_FORWARDS - 1)] for i in range(_PLAIN_FORWARDS)]
    inner = unwrapped(model)
    with watch() as seen:
        logp_T = score(model, stream).logp_T
        with _logit_dtype(inner) as dtypes:
            gaps = [_gap(model, logp_T, *row) for row in picked]
    if isinstance(stream, Forest) and (found := _unseen(inner.config.get_text_config(), seen)):
        raise NumericsError(f"start-up check of the packed stream: {found}. {_ADVICE}")
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
    accepts = signature(type(unwrapped(model)).forward).parameters
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


def _unseen(config: Any, seen: Seen) -> str | None:
    """What of the architecture the packed forward did not see."""
    total, given = config.num_hidden_layers, list(seen.layers.values())
    if len(given) < total:
        return f"it reached {len(given)} of {total} layers"
    kinds = getattr(config, "layer_types", None)
    slides = [bool(seen.mask_windows) and k == "sliding_attention" for k in kinds or ["sliding_attention"] * total]
    for layer, (expected, window) in enumerate(zip(slides, given)):
        if expected != (window is not None):
            has, told = ("has a", "is not told so") if expected else ("has no", f"is told {window}")
            return f"layer {layer} {has} sliding window in a plain forward, but its attention {told}"
    return None


@contextmanager
def _logit_dtype(model: Any) -> Iterator[list[torch.dtype]]:
    """The dtype of the LM head's output, which autocast may lower below the weights' own."""
    dtypes: list[torch.dtype] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype) if isinstance(out, Tensor) else None
    )
    try:
        yield dtypes
    finally:
        hook.remove()

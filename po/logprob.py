"""THE log-prob routine: log pi(y_t | x, y_<t) of response tokens, in fp32, and never a (positions, vocabulary) tensor.

`install` teaches a causal language model to score: called with `at_T` and `target_T`, its forward runs the backbone,
keeps the hidden states that predict a response token, and walks the LM head over them in chunks. The call goes through
the wrapped module (DDP, DeepSpeed, PEFT), so their hooks fire. A plain call is untouched.

The chunks' logits live for one chunk at a time, forward and backward. With a frozen head (LoRA) the gradient with
respect to the hidden states is formed while the chunk is there, so nothing is computed twice; with a trained head all
chunks but the last are computed again in the backward pass.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from po.attention import dropped, no_mask, watch
from po.errors import NumericsError
from po.forest import Forest, Padded

_CHUNK = {"cuda": 1 << 26, "cpu": 1 << 25}  # logits alive at a time, elements


class Scores(NamedTuple):
    """Per response token, flat (T,): the log-prob (with gradient), the entropy of its distribution (nats; zeros where
    it was not asked for) and whether the token was the most likely one. The latter two carry no gradient."""

    logp_T: Tensor
    entropy_T: Tensor
    correct_T: Tensor


class Shape(NamedTuple):
    """What a model does to its head's output before the softmax: logits = cap * tanh(scale * raw / cap)."""

    scale: float = 1.0
    softcap: float | None = None


def _logits(raw: Tensor, shape: Shape) -> Tensor:
    """The logits of one chunk from the head's raw output, (C, V), in fp32 (float64 stays)."""
    logits = raw if raw.dtype == torch.float64 else raw.float()
    if shape.scale != 1.0:
        logits = logits * shape.scale
    if shape.softcap is not None:
        logits = torch.tanh(logits / shape.softcap) * shape.softcap
    return logits


class _Chunk(NamedTuple):
    """A chunk of rows: its logits and their softmax, both (C, V)."""

    logits: Tensor
    prob: Tensor

    def score(self, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob, entropy, and whether the target is the likeliest, each (C,)."""
        top = self.logits.amax(-1)
        lse = top - self.prob.amax(-1).log()  # the likeliest token's probability is exp(top - lse)
        at = self.logits.gather(-1, target[:, None])[:, 0]
        ent = lse - torch.linalg.vecdot(self.prob, self.logits) if entropy else torch.zeros_like(lse)
        return at - lse, ent, at >= top

    def slope(self, target: Tensor, shape: Shape) -> Tensor:
        """d logp / d raw, (C, V); overwrites the softmax."""
        slope = self.prob.neg_()
        slope.scatter_add_(-1, target[:, None], torch.ones_like(slope[:, :1]))
        if shape.softcap is not None:
            slope *= 1 - (self.logits / shape.softcap) ** 2
        return slope if shape.scale == 1.0 else slope.mul_(shape.scale)


class _Walk:
    """Chunk after chunk of a linear head's rows in the same two buffers (a fresh 64 MB costs as much as a pass)."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, rows: int, dtype: torch.dtype, shape: Shape) -> None:
        self.w, self._shape, self._dtype = weight_VD.to(dtype), shape, dtype
        self._b = None if bias_V is None else bias_V.to(dtype)
        self._raw = weight_VD.new_empty(rows, weight_VD.shape[0], dtype=dtype)
        full = torch.float64 if dtype == torch.float64 else torch.float32
        self._prob = weight_VD.new_empty(rows, weight_VD.shape[0], dtype=full)

    def __call__(self, h: Tensor) -> _Chunk:
        h, raw = h.to(self._dtype), self._raw[: len(h)]
        if self._b is None:
            torch.mm(h, self.w.T, out=raw)
        else:
            torch.addmm(self._b, h, self.w.T, out=raw)
        logits = _logits(raw, self._shape)
        return _Chunk(logits, torch.softmax(logits, -1, out=self._prob[: len(h)]))


class _HeadLogProb(torch.autograd.Function):
    """Linear head + log-softmax + gather over chunks of rows.

    With a trained head the backward pass computes the chunks again, all but the last one, which is still there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        shape: Shape,
        entropy: bool,
        rows: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shape, ctx.rows, ctx.dtype = shape, rows, dtype
        trains_head = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
        early = hidden_TD.requires_grad and not trains_head
        walk = _Walk(weight_VD, bias_V, min(rows, len(hidden_TD)), dtype, shape)
        out, grads = [], []
        for h, y in zip(hidden_TD.split(rows), target_T.split(rows)):
            chunk = walk(h)
            out.append(chunk.score(y, entropy))
            if early:
                grads.append(chunk.slope(y, shape).to(dtype) @ walk.w)
        ctx.early = early
        if early:
            ctx.save_for_backward(torch.cat(grads))
        else:
            biases = () if bias_V is None else (bias_V,)
            ctx.save_for_backward(hidden_TD, weight_VD, *biases, target_T, *((chunk.slope(y, shape),) if out else ()))
        logp_T, entropy_T, correct_T = (torch.cat(x) for x in zip(*out))
        ctx.mark_non_differentiable(entropy_T, correct_T)
        return logp_T, entropy_T, correct_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, *_: Any) -> Any:
        if ctx.early:
            (grad_TD,) = ctx.saved_tensors
            return (grad_TD * grad_T[:, None].to(grad_TD.dtype), *(None,) * 7)
        hidden_TD, weight_VD, *bias, target_T, last = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_w = torch.zeros_like(weight_VD, dtype=grad_T.dtype) if need_weight else None
        grad_b = torch.zeros_like(bias[0], dtype=grad_T.dtype) if bias and need_bias else None
        w = weight_VD.to(ctx.dtype)
        walk = None
        grads: list[Tensor] = []
        for h, y, g in reversed(list(zip(*(x.split(ctx.rows) for x in (hidden_TD, target_T, grad_T))))):
            if last is not None:
                slope, last = last, None
            else:
                walk = walk or _Walk(w, bias[0] if bias else None, len(h), ctx.dtype, ctx.shape)
                slope = walk(h).slope(y, ctx.shape)
            if grad_b is not None:
                grad_b += slope.T @ g.to(slope.dtype)
            if need_hidden:
                grads.insert(0, (slope.to(ctx.dtype) @ w) * g[:, None].to(ctx.dtype))
            if grad_w is not None:
                grad_w.addmm_(slope.T.to(grad_w.dtype), h.to(grad_w.dtype) * g[:, None])
        return (
            torch.cat(grads).to(hidden_TD.dtype) if need_hidden else None,
            None if grad_w is None else grad_w.to(weight_VD.dtype),
            None if grad_b is None else grad_b.to(bias[0].dtype),
            *(None,) * 5,
        )


def _rows(vocabulary: int, device: torch.device) -> int:
    return max(16, _CHUNK.get(device.type, _CHUNK["cuda"]) // vocabulary)


def _score_linear(head: nn.Linear, hidden_TD: Tensor, target_T: Tensor, shape: Shape, entropy: bool) -> Scores:
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
    with torch.autocast(device, enabled=False):
        rows = _rows(head.weight.shape[0], hidden_TD.device)
        return Scores(*_HeadLogProb.apply(hidden_TD, head.weight, head.bias, target_T, shape, entropy, rows, dtype))


def _score_module(head: nn.Module, hidden_TD: Tensor, target_T: Tensor, shape: Shape, entropy: bool) -> Scores:
    """Any head (LoRA on it, a trained copy of it): each chunk goes through the module, and again in backward."""

    def chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob = _logits(head(h), shape).log_softmax(-1)
        logp = log_prob.gather(-1, y[:, None])[:, 0]
        with torch.no_grad():
            ent = -(log_prob.exp() * log_prob).sum(-1) if entropy else torch.zeros_like(logp)
            return logp, ent, logp >= log_prob.amax(-1)

    rows = _rows(getattr(head, "out_features", 1 << 16), hidden_TD.device)
    parts = [checkpoint(chunk, h, y, use_reentrant=False) for h, y in zip(hidden_TD.split(rows), target_T.split(rows))]
    return Scores(*(torch.cat(x) for x in zip(*parts)))


def _linear_forward(head: nn.Linear, x: Tensor, target_T: Tensor | None = None, **scoring: Any) -> Any:
    """An LM head's forward that can score in place, so that ZeRO-3 gathers its weight once for all chunks."""
    if target_T is None:
        return nn.functional.linear(x, head.weight, head.bias)
    return tuple(_score_linear(head, x, target_T, **scoring))


def _logit_shape(config: Any) -> Shape:
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return Shape(scale, getattr(text, "final_logit_softcapping", None))


def _scoring_forward(model: Any, *args: Any, at_T: Tensor | None = None, **kwargs: Any) -> Any:
    if at_T is None:
        return type(model).forward(model, *args, **kwargs)
    target_T, entropy = kwargs.pop("target_T"), kwargs.pop("entropy")
    call = {k: v for k, v in kwargs.items() if v is not None}  # PEFT fills in labels=None and the like
    hidden_NLD = model.base_model(*args, **call).last_hidden_state
    hidden_TD = hidden_NLD.flatten(0, 1)[at_T]
    head, shape = model.get_output_embeddings(), _logit_shape(model.config)
    if type(head) is nn.Linear:
        return Scores(*head(hidden_TD, target_T=target_T, shape=shape, entropy=entropy))
    return _score_module(head, hidden_TD, target_T, shape, entropy)


def install(model: nn.Module) -> None:
    """Teach a `transformers` causal language model to score (before PEFT wraps it). Idempotent.

    Raises ValueError for a model without a backbone or an LM head that can be called apart.
    """
    base, head = getattr(model, "base_model", model), model.get_output_embeddings()  # type: ignore[operator]
    if base is model or head is None:
        raise ValueError(f"{type(model).__name__} has no backbone and LM head that can be called one after the other")
    if type(head) is nn.Linear:
        head.forward = MethodType(_linear_forward, head)  # type: ignore[method-assign]
    model.forward = MethodType(_scoring_forward, model)


def score(model: nn.Module, stream: Forest | Padded, entropy: bool = False) -> Scores:
    """Log-probs of all response tokens of a stream, in its order. `model` is what the trainer holds, wrapped or not.

    Returns (T,) fp32 (float64 for a float64 model). `entropy` asks for the entropies too: one more pass over the
    logits of each chunk. Raises NumericsError where a forest does not reach the attention layers.
    """
    call: dict[str, Any] = {"at_T": stream.at_T, "target_T": stream.target_T, "entropy": entropy, "use_cache": False}
    if isinstance(stream, Forest):
        mask = no_mask(stream.input_S.device)
        call |= {"input_ids": stream.input_S[None], "position_ids": stream.position_S[None], "forest": stream}
    else:
        mask = stream.mask_NL
        call |= {"input_ids": stream.input_NL}
    with watch() as seen:
        scores = cast(Scores, model(attention_mask=mask, **call))
    if isinstance(stream, Forest) and not seen.layers:
        raise NumericsError(dropped(model))
    return scores

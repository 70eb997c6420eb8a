"""An LM head over chunks of rows: everything that needs logits, and never a (positions, vocabulary) tensor.

The chunks' logits live for one chunk at a time, forward and backward. With a frozen head (LoRA) the log-probs' gradient
with respect to the hidden states is formed while the chunk is there, so nothing is computed twice. With a trained head
all chunks but the last are computed again in the backward pass; so they are where candidates or KLs carry gradient too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from po.chunk import Chunk, Grad, Part, pull
from po.errors import UserError
from po.scores import Against, Scores, Shape, Want

_CHUNK = {"cuda": 1 << 26, "cpu": 1 << 25}  # logits alive at a time, elements


def _split(hidden_TD: Tensor, target_T: Tensor, want: Want, rows: int) -> list[Part]:
    """Chunks of so many rows; one empty one where there are none."""
    along = (hidden_TD, target_T, want.candidate_TM, want.kl_against and want.kl_against.final_TD)
    chunks = [slice(i, i + rows) for i in range(0, max(1, len(hidden_TD)), rows)]
    return [Part(*(None if x is None else x[at] for x in along)) for at in chunks]  # type: ignore[arg-type]


class _Plan(NamedTuple):
    """How rows are walked."""

    want: Want
    shape: Shape
    rows: int
    dtype: torch.dtype  # of the matrix products
    autocast: bool  # whether that is autocast's
    trains: bool  # False under no_grad: nothing is kept for a backward pass

    @property
    def more(self) -> bool:
        """Whether anything but log-probs carries gradient."""
        return self.want.candidate_TM is not None or self.want.kl_against is not None

    def kept(self, part: Part, chunk: Chunk, ref: Chunk | None) -> tuple[Tensor | None, ...]:
        """What the backward pass needs of a chunk: the log-probs' gradient, or what `pull` takes."""
        if not self.more:
            return (chunk.slope(part, self.shape),)
        capped = self.shape.softcap is not None
        return chunk.logits if capped else None, chunk.prob, None if ref is None else ref.prob

    def reference(self, weight_VD: Tensor, bias_V: Tensor | None, rows: int) -> Callable[[Tensor], Chunk] | None:
        """Chunk after chunk of the reference's rows; None where no KL is wanted."""
        if (against := self.want.kl_against) is None:
            return None
        head, shape = against.head, against.shape
        dtype = self.dtype if self.autocast else against.final_TD.dtype
        if head is None:
            return _Walk(weight_VD, bias_V, rows, dtype, self.shape)
        if type(head) is nn.Linear:
            return _Walk(head.weight, head.bias, rows, dtype, shape)

        def walk(h: Tensor) -> Chunk:  # an adapter on the reference's head
            with torch.autocast(h.device.type, dtype, enabled=self.autocast):
                logits = shape.logits(head(h))
            return Chunk(logits, logits.softmax(-1))

        return walk


class _Walk:
    """Chunk after chunk of a linear head's rows in the same two buffers (a fresh 64 MB costs as much as a pass)."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, rows: int, dtype: torch.dtype, shape: Shape) -> None:
        self.w, self._shape, self._dtype = weight_VD.to(dtype), shape, dtype
        self._b = None if bias_V is None else bias_V.to(dtype)
        self._raw = weight_VD.new_empty(rows, weight_VD.shape[0], dtype=dtype)
        full = torch.float64 if dtype == torch.float64 else torch.float32
        self._prob = weight_VD.new_empty(rows, weight_VD.shape[0], dtype=full)

    def __call__(self, h: Tensor) -> Chunk:
        h, raw = h.to(self._dtype), self._raw[: len(h)]
        if self._b is None:
            torch.mm(h, self.w.T, out=raw)
        else:
            torch.addmm(self._b, h, self.w.T, out=raw)
        logits = self._shape.logits(raw)
        return Chunk(logits, torch.softmax(logits, -1, out=self._prob[: len(h)]))


class _Both:
    """The policy's chunk and the reference's, part after part."""

    def __init__(self, plan: _Plan, weight_VD: Tensor, bias_V: Tensor | None, rows: int) -> None:
        self._policy = _Walk(weight_VD, bias_V, rows, plan.dtype, plan.shape)
        self._ref = plan.reference(weight_VD, bias_V, rows)
        self.w = self._policy.w

    def __call__(self, part: Part) -> tuple[Chunk, Chunk | None]:
        ref = self._ref(part.ref) if self._ref is not None and part.ref is not None else None
        return self._policy(part.hidden), ref


class _LinearHead(torch.autograd.Function):
    """Linear head, softmax, and what is read off it, over chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, plan: _Plan
    ) -> Any:
        trains_head = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
        ctx.plan, ctx.early = plan, hidden_TD.requires_grad and not trains_head and not plan.more
        walk = _Both(plan, weight_VD, bias_V, min(plan.rows, len(hidden_TD)))
        out, grads = [], []
        for part in _split(hidden_TD, target_T, plan.want, plan.rows):
            chunk, ref = walk(part)
            out.append(chunk.score(plan.want, part, ref))
            if ctx.early:
                grads.append(chunk.slope(part, plan.shape).to(plan.dtype) @ walk.w)
        if ctx.early:
            ctx.save_for_backward(torch.cat(grads))
        elif plan.trains:
            ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, *plan.kept(part, chunk, ref))
        found = _joined(out)
        ctx.mark_non_differentiable(*(x for x in found[1:4] if x is not None))
        return found

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, *others: Any) -> Any:
        if ctx.early:
            (grad_TD,) = ctx.saved_tensors
            return (grad_TD * grad_T[:, None].to(grad_TD.dtype), *(None,) * 4)
        plan: _Plan = ctx.plan
        hidden_TD, weight_VD, bias_V, target_T, *kept = ctx.saved_tensors
        total = _Sums(ctx.needs_input_grad, weight_VD, bias_V, grad_T.dtype)
        w, walk = weight_VD.to(plan.dtype), None
        for i, part in reversed(list(enumerate(_split(hidden_TD, target_T, plan.want, plan.rows)))):
            at = slice(i * plan.rows, (i + 1) * plan.rows)
            grad = Grad(*(None if x is None else x[at] for x in (grad_T, *others[3:])))  # type: ignore[arg-type]
            if not kept:
                walk = walk or _Both(plan, w, bias_V, min(plan.rows, len(hidden_TD)))
                kept = plan.kept(part, *walk(part))
            slope, size = pull(part, grad, plan.shape, *kept) if plan.more else (kept[0], grad.logp)
            kept = ()
            total.add(part.hidden, slope, size, w)
        return *total.given(hidden_TD.dtype), None, None


class _Sums:
    """The gradients of a linear head's input, weight and bias, added up from the last chunk to the first."""

    def __init__(self, needed: Any, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> None:
        self._hidden: list[Tensor] | None = [] if needed[0] else None
        self._weight = torch.zeros_like(weight_VD, dtype=dtype) if needed[1] else None
        self._bias = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed[2] else None
        self._dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype

    def add(self, h: Tensor, slope: Tensor, g: Tensor, w: Tensor) -> None:
        """One chunk, whose gradient with respect to the head's output is g[:, None] * slope."""
        if self._bias is not None:
            self._bias += slope.T @ g.to(slope.dtype)
        if self._hidden is not None:
            self._hidden.insert(0, (slope.to(w.dtype) @ w) * g[:, None].to(w.dtype))
        if self._weight is not None:
            self._weight.addmm_(slope.T.to(self._weight.dtype), h.to(self._weight.dtype) * g[:, None])

    def given(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, bias = self._dtypes
        return (
            None if self._hidden is None else torch.cat(self._hidden).to(dtype),
            None if self._weight is None else self._weight.to(weight),
            None if self._bias is None else self._bias.to(bias),
        )


def _joined(parts: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """The scores of all chunks, from those of each."""
    return tuple(None if x[0] is None else torch.cat(x) for x in zip(*parts))


def _rows(vocabulary: int, device: torch.device) -> int:
    return max(16, _CHUNK.get(device.type, _CHUNK["cuda"]) // vocabulary)


def _sized(against: Against | None, vocabulary: int | None) -> None:
    """The two distributions must be over the same tokens."""
    other = getattr(against.head, "out_features", None) if against is not None else None
    if other is not None and vocabulary is not None and other != vocabulary:
        raise UserError(
            f"reference.from: its LM head has {other} outputs and the policy's has {vocabulary}, so there is no KL "
            "between them; expected a reference of the policy's own size, such as `from: init`"
        )


def score_linear(head: nn.Linear, hidden_TD: Tensor, target_T: Tensor, want: Want, shape: Shape) -> Scores:
    """What is read off a plain LM head."""
    device = hidden_TD.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_TD.dtype
    _sized(want.kl_against, head.out_features)
    plan = _Plan(want, shape, _rows(head.weight.shape[0], device), dtype, autocast, torch.is_grad_enabled())
    with torch.autocast(device.type, enabled=False):
        return Scores(*_LinearHead.apply(hidden_TD, head.weight, head.bias, target_T, plan))


def score_module(head: nn.Module, hidden_TD: Tensor, target_T: Tensor, want: Want, shape: Shape) -> Scores:
    """Any head (LoRA on it, a trained copy of it): each chunk goes through the module, and again in backward."""
    against = want.kl_against
    vocabulary = getattr(head, "out_features", None)
    _sized(against, vocabulary)
    ref_head, ref_shape = (None, shape) if against is None else (against.head, against.shape)
    if against is not None and ref_head is None:
        ref_head, ref_shape = without_adapter(head), shape

    def chunk(part: Part) -> tuple[Tensor | None, ...]:
        log_prob = shape.logits(head(part.hidden)).log_softmax(-1)
        logp = log_prob.gather(-1, part.target[:, None])[:, 0]
        given = kl = None
        if (c := part.candidate) is not None:
            given = log_prob.gather(-1, c.clamp(min=0)).masked_fill(c < 0, 0)
        with torch.no_grad():
            ent = -(log_prob.exp() * log_prob).sum(-1) if want.entropy else torch.zeros_like(logp)
            collision = (2 * log_prob).logsumexp(-1) if want.collision else None
            correct = logp >= log_prob.amax(-1)
            ref = None if ref_head is None else ref_shape.logits(ref_head(part.ref)).log_softmax(-1)
        if ref is not None:
            kl = (ref.exp() * (ref - log_prob)).sum(-1)
        return logp, ent, correct, collision, given, kl

    rows = _rows(vocabulary or 1 << 16, hidden_TD.device)
    parts = [checkpoint(chunk, part, use_reentrant=False) for part in _split(hidden_TD, target_T, want, rows)]
    return Scores(*_joined(parts))  # type: ignore[arg-type]


def without_adapter(head: Any) -> nn.Module:
    """An LM head as the base model has it, below PEFT's adapter or trained copy."""
    found: nn.Module = getattr(head, "original_module", None) or getattr(head, "base_layer", head)
    return found

"""Attention over the packed forest: query (1, H, S, Dk), key (1, Hk, S, Dk), value (1, Hk, S, Dv) -> (1, H, S, Dv).

    sliced   CPU. Only what is visible is computed: [trunk; first branch] and every other branch causally over itself,
             and in one call the other branches' queries over the trunk; the halves are merged by their logsumexp.
             Windows shorter than a sequence and soft-capping take a slower path, one masked slice per branch.
    flex     CUDA. FlexAttention, with the forest's rule as its mask. On CPU it runs forward only, uncompiled.
    dense    The oracle: an (S, S) mask.

`window` limits a query to keys less than so many positions back; `softcap` c replaces a score s by c * tanh(s / c).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad as pad_end
from torch.nn.functional import scaled_dot_product_attention as sdpa

from po.forest import Forest, Tree

_T = TypeVar("_T")
_BLOCK = 128  # FlexAttention's granularity
_memo: WeakKeyDictionary[Forest, dict[Any, Any]] = WeakKeyDictionary()  # masks, once per forest

# Grouped queries: read natively by the CPU kernels from this version on (earlier ones were not tried).
_NATIVE_GQA = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Softmax(softcap * tanh(scale * q k / softcap) + mask) v, softmax in fp32 (float64 stays). (B, H, n, Dv)"""
    batch, heads, n, _ = query.shape
    kv = key.shape[1]
    folded = query.reshape(batch, kv, heads // kv * n, -1)  # grouped queries as rows: keys are not repeated
    score = torch.tanh(folded @ key.transpose(-1, -2) * (scale / softcap)) * softcap
    score = score.view(batch, heads, n, -1) + mask
    prob = score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(value.dtype)
    return (prob.view(batch, kv, heads // kv * n, -1) @ value).view(batch, heads, n, -1)


def _once(forest: Forest, key: Any, make: Callable[[], _T]) -> _T:
    """make(), remembered as long as the forest lives: all layers share it."""
    memo = _memo.setdefault(forest, {})
    if key not in memo:
        memo[key] = make()
    made: _T = memo[key]
    return made


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to the scores: 0 where seen, elsewhere very negative (finite: a row that sees nothing, as
    left padding does, must not become NaN)."""
    low = torch.finfo(dtype).min / 2
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, low)


def dense(
    q: Tensor, k: Tensor, v: Tensor, f: Forest, window: int | None, softcap: float | None, scale: float
) -> Tensor:
    mask = _once(f, ("dense", window, q.dtype), lambda: bias(f.visible_SS(window), q.dtype))
    if softcap is not None:
        return explicit(q, k, v, mask, scale, softcap)
    return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def sliced(
    q: Tensor, k: Tensor, v: Tensor, f: Forest, window: int | None, softcap: float | None, scale: float
) -> Tensor:
    gqa = k.shape[1] != q.shape[1]
    plain = window is None and softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
    if plain and (not gqa or _NATIVE_GQA):
        out: Tensor = _Branches.apply(*map(_dense_rows, (q, k, v)), f.trees, scale)
        return out

    def attend(qs: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
        n, m = qs.shape[2], ks.shape[2]
        if n == m and window is None and softcap is None:
            return sdpa(qs, ks, vs, is_causal=True, scale=scale, enable_gqa=gqa)
        mask = _once(f, ("slice", n, m, window, q.dtype), lambda: bias(_lower_right(n, m, window, q.device), q.dtype))
        if softcap is not None:
            return explicit(qs, ks, vs, mask, scale, softcap)
        return sdpa(qs, ks, vs, attn_mask=mask, scale=scale, enable_gqa=gqa)

    parts = []
    for tree in f.trees:
        (a, b), (_, c) = tree.trunk, tree.branches[0]
        parts.append(attend(q[:, :, a:c], k[:, :, a:c], v[:, :, a:c]))
        a = a if window is None else max(a, b - window + 1)  # the part of the trunk that a branch can see
        for s, e in tree.branches[1:]:
            ks, vs = (torch.cat((x[:, :, a:b], x[:, :, s:e]), 2) for x in (k, v))
            parts.append(attend(q[:, :, s:e], ks, vs))
    return torch.cat(parts, 2)


def _lower_right(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """Causal with the last query at the last key, (n, m) bool; optionally only keys less than `window` back."""
    back = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def _dense_rows(x: Tensor) -> Tensor:
    """The CPU kernels assume that the last axis lies dense, and do not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Branches(torch.autograd.Function):
    """Attention of the forest in slices without masks or copies.

    Softmax over [trunk; branch] is the mean of the softmaxes over each, weighted by the exponentials of their
    logsumexps. Backward, each slice's kernel is given the whole output and the whole logsumexp: with
    P = exp(score - logsumexp) its part of the gradient is already the exact one.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, trees: tuple[Tree, ...], scale: float) -> Tensor:
        batch, heads, n, _ = q.shape
        out = q.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, n, dtype=torch.promote_types(q.dtype, torch.float32))

        def attend(rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            x: tuple[Tensor, Tensor] = _flash(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale)
            return x

        for tree in trees:
            for own in _runs(tree):
                out[:, :, own], lse[:, :, own] = attend(own, own, True)
            trunk, others = _rest(tree)
            if trunk.stop > trunk.start and others.stop > others.start:
                above, above_lse = attend(others, trunk, False)
                own_lse = lse[:, :, others]
                share = torch.sigmoid(above_lse - own_lse)[..., None]
                out[:, :, others] = torch.lerp(out[:, :, others].to(lse.dtype), above.to(lse.dtype), share).to(q.dtype)
                lse[:, :, others] = torch.logaddexp(above_lse, own_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.trees, ctx.scale = trees, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _dense_rows(grad)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        def attend(r: slice, c: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            rows = (q[:, :, r], k[:, :, c], v[:, :, c], out[:, :, r], lse[:, :, r])
            x: tuple[Tensor, Tensor, Tensor] = _flash_backward(grad[:, :, r], *rows, 0.0, causal, scale=ctx.scale)
            return x

        for tree in ctx.trees:
            for own in _runs(tree):
                dq[:, :, own], dk[:, :, own], dv[:, :, own] = attend(own, own, True)
            trunk, others = _rest(tree)
            if trunk.stop > trunk.start and others.stop > others.start:
                for total, at, part in zip((dq, dk, dv), (others, trunk, trunk), attend(others, trunk, False)):
                    total[:, :, at] += part
        return dq, dk, dv, None, None


def _runs(tree: Tree) -> list[slice]:
    """What attends causally over itself: trunk and first branch as one, then every other branch."""
    first, *others = tree.branches
    return [slice(tree.trunk[0], first[1]), *(slice(s, e) for s, e in others)]


def _rest(tree: Tree) -> tuple[slice, slice]:
    """The trunk, and all branches but the first."""
    return slice(*tree.trunk), slice(tree.branches[0][1], tree.branches[-1][1])


def flex(q: Tensor, k: Tensor, v: Tensor, f: Forest, window: int | None, softcap: float | None, scale: float) -> Tensor:
    mask = _once(f, ("flex", window), lambda: block_mask(f, window))
    out: Tensor = _flex_on(q.device.type)(
        q, k, v, score_mod=_capped(softcap), block_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out


@cache
def _flex_on(device: str) -> Any:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None
    return lambda score, b, h, i, j: torch.tanh(score / softcap) * softcap


def block_mask(f: Forest, window: int | None) -> BlockMask:
    """The forest's rule for FlexAttention. Which blocks are empty, partly or wholly visible follows from each block's
    extremes, without an (S, S) tensor and without waiting for the device; a block in doubt counts as partly visible.

    One mask function serves every forest and window, so that the kernel is compiled once.
    """
    S, device = f.input_S.numel(), f.input_S.device
    end_S, position_S = f.subtree_end_S, f.position_S
    reach = torch.full((), S if window is None else window, device=device)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end_S[j]) & (position_S[i] - position_S[j] < reach)

    n = -(-S // _BLOCK)
    end, pos = (pad_end(x, (0, n * _BLOCK - S)).view(n, _BLOCK) for x in (end_S, position_S))
    first = torch.arange(n, device=device) * _BLOCK
    last = first + _BLOCK - 1
    some = (first <= last[:, None]) & (end.amax(1) > first[:, None])
    some &= pos.amin(1)[:, None] - pos.amax(1) < reach
    full = (last <= first[:, None]) & (last[:, None] < end.amin(1))  # never at the padded end: there end is 0
    full &= pos.amax(1)[:, None] - pos.amin(1) < reach
    partly, wholly = _lists(some & ~full), _lists(full)
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(S, S))


def _lists(at: Tensor) -> tuple[Tensor, Tensor]:
    """(n, n) bool -> how many key blocks each query block has, and which come first."""
    index = at.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return at.sum(-1, dtype=torch.int32)[None, None], index.to(torch.int32)[None, None]

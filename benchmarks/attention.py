"""Forward and backward of one attention layer over preference batches: the sliced backend against its alternatives.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

4 groups; prompts of about 200 and responses of about 120 tokens (log-normal, sigma 0.4); 4 heads of 64; fp32. Printed
is the fastest of the repetitions, in milliseconds of CPU time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from po.forest import Forest, Tree, plant
from po.kernels import bias, dense, sliced

SCALE = 64**-0.5


def masked_slices(q: Tensor, k: Tensor, v: Tensor, f: Forest) -> Tensor:
    """One call per branch over [trunk; branch], under a mask: what `sliced` does where a window needs one."""
    return sliced(q, k, v, f, 1 << 30, None, SCALE)


def masked_trees(q: Tensor, k: Tensor, v: Tensor, f: Forest) -> Tensor:
    """One call per group, under the group's part of the dense mask."""
    seen_SS, parts = f.visible_SS(), []
    for tree in f.trees:
        at = slice(tree.trunk[0], tree.branches[-1][1])
        mask = bias(seen_SS[at, at], q.dtype)
        parts.append(sdpa(q[:, :, at], k[:, :, at], v[:, :, at], attn_mask=mask, scale=SCALE, enable_gqa=True))
    return torch.cat(parts, 2)


def padded_branches(q: Tensor, k: Tensor, v: Tensor, f: Forest) -> Tensor:
    """The trunk causally, then all branches of a group as one batch, padded to the longest."""

    def batch(x: Tensor, tree: Tree) -> Tensor:
        rows = [x[0, :, s:e].transpose(0, 1) for s, e in tree.branches]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)

    parts = []
    for tree in f.trees:
        (a, b), K = tree.trunk, len(tree.branches)
        if b > a:
            parts.append(sdpa(*(x[:, :, a:b] for x in (q, k, v)), is_causal=True, scale=SCALE, enable_gqa=True))
        qs, *kv = (batch(x, tree) for x in (q, k, v))
        ks, vs = (torch.cat((x[:, :, a:b].expand(K, -1, -1, -1), y), 2) for x, y in zip((k, v), kv))
        n = qs.shape[2]
        mask = bias(torch.ones(n, b - a + n, dtype=torch.bool).tril(b - a), q.dtype)
        out = sdpa(qs, ks, vs, attn_mask=mask, scale=SCALE, enable_gqa=True)
        parts += [row[None, :, : e - s] for row, (s, e) in zip(out, tree.branches)]
    return torch.cat(parts, 2)


LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor, Forest], Tensor]] = {
    "sliced": lambda q, k, v, f: sliced(q, k, v, f, None, None, SCALE),
    "masked slices": masked_slices,
    "padded branches": padded_branches,
    "masked trees": masked_trees,
    "dense": lambda q, k, v, f: dense(q, k, v, f, None, None, SCALE),
}


def compare(K: int, kv_heads: int, repetitions: int) -> None:
    rng = random.Random(K)

    def ids(median: int) -> list[int]:
        return [1] * max(1, round(rng.lognormvariate(math.log(median), 0.4)))

    f = plant([(ids(200), [ids(120) for _ in range(K)]) for _ in range(4)], K)
    S = f.input_S.numel()
    qkv = [torch.randn(1, S, h, 64).transpose(1, 2).requires_grad_() for h in (4, kv_heads, kv_heads)]
    direction = torch.randn(1, 4, S, 64)
    best = dict.fromkeys(LAYOUTS, math.inf)
    for _ in range(repetitions):
        for name, attend in LAYOUTS.items():
            start = time.process_time()
            torch.autograd.grad(attend(*qkv, f), qkv, direction)
            best[name] = min(best[name], time.process_time() - start)
    times = "  ".join(f"{name} {1e3 * t:.1f}" for name, t in best.items())
    print(f"K={K} key heads={kv_heads} S={S}:  {times}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=12)
    for K, kv_heads in ((2, 4), (2, 2), (8, 4), (8, 2)):
        compare(K, kv_heads, parser.parse_args().repetitions)

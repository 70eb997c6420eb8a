"""The forest's attention: every backend against the dense mask, and the ordinary attention of plain forwards."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from tiny_models import furthest, ragged, tiny
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from po import kernels
from po.attention import backend, forest_attention, no_mask, using, watch
from po.errors import NumericsError, UserError
from po.forest import Forest, plant

SHAPES = [(4, 4, 16, 16), (4, 2, 12, 12), (6, 1, 8, 8), (4, 2, 12, 20)]  # query heads, key heads, key dim, value dim


def qkv(f: Forest, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    heads, kv, dk, dv = shape
    torch.manual_seed(1)
    S = f.input_S.numel()
    out = [torch.randn(1, S, h, d, dtype=dtype).transpose(1, 2) for h, d in ((heads, dk), (kv, dk), (kv, dv))]
    return [x.requires_grad_() for x in out]


def by_definition(q: Tensor, k: Tensor, v: Tensor, f: Forest, window: int | None, softcap: float | None) -> Tensor:
    """Softmax attention over the visible keys, with nothing clever about it."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    score = q @ k.transpose(-1, -2) * 0.3
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    return score.masked_fill(~f.visible_SS(window), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["sliced", "dense"])
def test_backends_equal_the_definition_with_gradients(name: str, shape, window: int | None, softcap: float | None):
    f = plant(ragged(), 4)
    x = qkv(f, shape)
    expected = by_definition(*x, f, window, softcap)
    found = getattr(kernels, name)(*x, f, window, softcap, 0.3)
    assert found.dtype == torch.float64
    assert furthest([found], [expected]) < 1e-13
    direction = torch.randn_like(expected)
    assert furthest(torch.autograd.grad(found, x, direction), torch.autograd.grad(expected, x, direction)) < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_equals_the_definition(shape, window: int | None, softcap: float | None):
    f = plant(ragged(), 4)
    with torch.no_grad():  # torch's FlexAttention has no backward pass on CPU
        x = [y.detach() for y in qkv(f, shape)]
        found = kernels.flex(*x, f, window, softcap, 0.3)
        assert furthest([found], [by_definition(*x, f, window, softcap)]) < 1e-13


def test_the_slices_copy_rows_that_do_not_lie_dense():
    """The CPU kernels read garbage from them: their last axis must have stride 1."""
    f = plant(ragged(), 4)
    with torch.no_grad():
        x = qkv(f, (4, 2, 12, 12))
        strided = [y.transpose(-1, -2).contiguous().transpose(-1, -2) for y in x]
        assert strided[0].stride(-1) != 1
        assert torch.equal(*(kernels.sliced(*y, f, None, None, 0.3) for y in (x, strided)))
    found = kernels.sliced(*x, f, None, None, 0.3)
    expected = by_definition(*x, f, None, None)
    assert furthest(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x)) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision_is_close(dtype: torch.dtype, bound: float):
    f = plant(ragged(), 4)
    x = qkv(f, (4, 2, 16, 16), dtype)
    exact = [y.detach().double().requires_grad_() for y in x]
    found, expected = kernels.sliced(*x, f, None, None, 0.3), by_definition(*exact, f, None, None)
    assert found.dtype == dtype
    assert furthest([found.double()], [expected]) < bound
    grads = torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), exact)
    assert furthest([g.double() for g in grads[0]], grads[1]) < 10 * bound


def test_the_slices_ask_for_no_mask_and_no_square():
    """The promise of the fast path: no (S, S) tensor, and per group no [trunk; branch] copies of keys."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    f = plant([([1] * 30, [[2] * 9, [3] * 8, [4] * 7])], 3)
    x = qkv(f, (4, 2, 16, 16))
    with Calls() as calls:
        kernels.sliced(*x, f, None, None, 0.3).sum().backward()
    flash = [n for n in calls.names if "flash_attention" in n]
    assert len(flash) == 2 * 4  # forward and backward: trunk with first branch, two branches, their look at the trunk
    assert not any(n.startswith(("cat", "masked_fill", "repeat", "_softmax")) for n in calls.names)


# FlexAttention's block lists


@pytest.mark.parametrize("window", [None, 1, 40, 128, 200])
@pytest.mark.parametrize("seed", range(4))
def test_block_lists_cover_what_is_visible(seed: int, window: int | None):
    f = plant(ragged(seed, groups=6, prompt=330, response=150), 4)
    mask = kernels.block_mask(f, window)
    S = f.input_S.numel()
    n = -(-S // 128)
    seen = torch.zeros(n * 128, n * 128, dtype=torch.bool)
    seen[:S, :S] = f.visible_SS(window)
    blocks = seen.view(n, 128, n, 128).transpose(1, 2)
    some, every = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    partly, wholly = (
        torch.stack([torch.isin(torch.arange(n), row[:count]) for row, count in zip(index[0, 0], num[0, 0])])
        for num, index in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (partly & wholly).any()
    assert not (some & ~(partly | wholly)).any(), "a visible block is skipped"
    assert not (wholly & ~every).any(), "a block that is partly hidden is read in full"
    if window is None:
        assert torch.equal(wholly, every)
        assert (partly | wholly).sum() <= 1.3 * some.sum()


@pytest.mark.slow
def test_compiled_flex_equals_the_definition():
    """The compiled CPU kernel goes by the block lists, which the uncompiled one does not read."""
    compiled = torch.compile(flex_attention)
    for seed, window in ((0, None), (1, 50)):
        f = plant(ragged(seed, groups=5, prompt=300, response=150), 4)
        with torch.no_grad():
            x = [y.detach() for y in qkv(f, (4, 2, 32, 32), torch.float32)]
            found = compiled(*x, block_mask=kernels.block_mask(f, window), scale=0.3, enable_gqa=True)
            assert furthest([found], [by_definition(*x, f, window, None)]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", [(4, 4, 64, 64), (14, 2, 64, 64)])
def test_flex_on_the_gpu_equals_the_definition_with_gradients(shape, window: int | None, softcap: float | None):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from dataclasses import fields, replace

    host = plant(ragged(3, groups=6, prompt=300, response=150), 4)
    f = replace(host, **{x.name: getattr(host, x.name).cuda() for x in fields(host) if x.name != "trees"})
    x = [y.detach().cuda().requires_grad_() for y in qkv(f, shape, torch.float32)]
    found, expected = kernels.flex(*x, f, window, softcap, 0.3), by_definition(*x, f, window, softcap)
    direction = torch.randn_like(expected)
    assert furthest([found], [expected]) < 1e-3
    assert furthest(torch.autograd.grad(found, x, direction), torch.autograd.grad(expected, x, direction)) < 1e-2


# The seam with transformers


def test_backend_by_device():
    assert backend(torch.device("cpu")) == "sliced"
    assert backend(torch.device("cuda")) == "flex"
    with using("dense"):
        assert backend(torch.device("cuda")) == "dense"
    assert backend(torch.device("cpu")) == "sliced"


def call(f: Forest | None, mask: Tensor | None = None, module: torch.nn.Module | None = None, **kwargs):
    x = qkv(f or plant(ragged(), 4), (4, 2, 12, 12))
    return forest_attention(module or torch.nn.Identity(), *x, mask, forest=f, **kwargs)[0]


def test_a_window_longer_than_every_sequence_is_none():
    f = plant(ragged(), 4)
    with watch() as seen:
        assert torch.equal(call(f, sliding_window=f.longest), call(f))
    assert list(seen.layers.values()) == [f.longest, None]


def test_autocast_lowers_the_inputs():
    f = plant(ragged(), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(f).dtype == torch.bfloat16


def refused(error: type[Exception], text: str, f: Forest | None, **kwargs) -> None:
    with pytest.raises(error, match="^" + re.escape(text) + "$"):
        call(f, **kwargs)


def test_what_cannot_be_computed_is_refused():
    f = plant(ragged(), 4)
    refused(
        UserError,
        "Identity: attention dropout 0.1 while scoring responses; expected 0. Log-probs under dropout are noise to a "
        "preference loss: set the config's attention dropout to 0",
        f,
        dropout=0.1,
    )
    refused(
        UserError,
        "Identity has attention sinks, which po's attention does not compute",
        f,
        s_aux=torch.zeros(4),
    )
    refused(
        UserError,
        "Identity adds a position bias to its attention scores. Set model.share_prefix: false",
        f,
        position_bias=torch.zeros(1),
    )
    refused(
        UserError,
        "Identity: attention is not causal; po scores causal language models only",
        f,
        is_causal=False,
    )


def test_a_lost_forest_is_not_scored():
    refused(
        NumericsError,
        "Identity: the packed stream did not reach the attention layers, because the model's code does not hand its "
        "keyword arguments down to them. Set model.share_prefix: false",
        None,
        mask=no_mask(torch.device("cpu")),
    )


@pytest.mark.parametrize(("family", "own"), [("llama", "sdpa"), ("gemma2", "eager"), ("gemma3", "sdpa")])
def test_without_a_forest_a_model_attends_as_usual(family: str, own: str):
    """Plain, padded on either side, and generation with its cache."""
    model = tiny(family, torch.float32).eval()
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :9], right[0, -9:] = 0, 0
    found = {}
    for name in (own, "po_forest"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found[name] = [model(input_ids=ids).logits[0]]
            found[name] += [model(input_ids=ids, attention_mask=m).logits[m.bool()] for m in (left, right)]
            found[name] += [model.generate(ids, attention_mask=left, max_new_tokens=3, do_sample=False).float()]
    assert furthest(found[own], found["po_forest"]) < 1e-4

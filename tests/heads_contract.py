"""Promises that every head keeps, as functions of a head that raise when it does not. CHECKS lists them by name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from heads_support import (
    EMPTY_ROW,
    PER_TOKEN,
    change,
    loss_and_grad,
    parts,
    random_input,
    segments,
    tensors,
    within,
)
from torch import Tensor
from torch.testing import assert_close

from po.types import Head, HeadInput, Needs, Segments

CHECKS: dict[str, Callable[[Head], None]] = {}
SECTIONS = ("Paper", "Symbols", "Length", "Bounded below", "Pins the level", "Limits", "Departures", "Verified")


def check(function: Callable[[Head], None]) -> Callable[[Head], None]:
    CHECKS[function.__name__] = function
    return function


def sizes(head: Head, K: int, G: int = 8) -> list[list[int]]:
    """G groups of K responses (2 for pairs, 1 for unpaired rows) with 1 to 4 tokens each."""
    K = {"pair": 2, "unpaired": 1}.get(head.needs.layout, K)
    return [[1 + (3 * g + 2 * k) % 4 for k in range(K)] for g in range(G)]


@check
def is_a_frozen_dataclass_derived_from_head(head: Head) -> None:
    cls = type(head)
    assert cls.__bases__ == (Head,), f"{cls.__name__} must derive from Head directly"
    assert cls.__dataclass_params__.frozen, f"{cls.__name__} is not frozen"
    assert isinstance(cls.needs, Needs)
    assert cls(**dataclasses.asdict(head)) == head


@check
def fields_have_a_range(head: Head) -> None:
    """A recipe can only refuse what the type excludes; every default must be legal."""
    hints = get_type_hints(type(head), include_extras=True)
    for f in dataclasses.fields(head):
        hint, kind = hints[f.name], get_origin(hints[f.name])
        if hint is bool:
            continue
        assert kind in (Annotated, Literal), f"{f.name}: {hint} has no range; write Annotated[float, Gt(0)] or the like"
        if kind is Annotated:
            assert within(f.default, hint), f"{f.name}: {f.default} is not in {hint}"
            assert not within(math.nan, hint), f"{f.name}: {hint} has no bound"
        else:
            assert f.default in get_args(hint)


@check
def is_documented(head: Head) -> None:
    text = inspect.getdoc(sys.modules[type(head).__module__]) or ""
    assert text.isascii()
    missing = [s for s in SECTIONS if not re.search(rf"^{s}: \S", text, re.M)]
    assert not missing, f"the docstring lacks {missing}"
    words = set(re.findall(r"\w+", text))
    unexplained = [f.name for f in dataclasses.fields(head) if f.name not in words]
    assert not unexplained, f"the docstring does not mention {unexplained}"


@check
def reads_only_types_and_numeric(head: Head) -> None:
    tree = ast.parse(inspect.getsource(sys.modules[type(head).__module__]))
    imports = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imports += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    ours = {i for i in imports if i == "po" or i.startswith("po.")}
    assert ours <= {"po.types", "po.numeric"}, f"a head imports {sorted(ours)}"


@check
def loss_and_gradient_are_finite(head: Head) -> None:
    for same in (False, True):
        loss, grad_T = loss_and_grad(head, random_input(head, same=same))
        assert loss.isfinite().all(), f"policy == reference: {same}"
        assert grad_T.isfinite().all(), f"policy == reference: {same}"


@check
def extreme_inputs_stay_finite(head: Head) -> None:
    """Log-ratios of +-1000, one-token responses, tied, equal and huge rewards, and K = 1 .. 64 in one batch; fp32."""
    layout = head.needs.layout
    widest = {"pair": 2, "unpaired": 1}.get(layout)
    lengths = [[1] * (widest or k) for k in range(1, 65)]
    seg = segments(lengths)
    index_GK = torch.arange(seg.valid_GK.numel()).view_as(seg.valid_GK)
    shift_T = torch.tensor([1000.0, -1000.0, 0.0, -1e-6, 1000.0])[torch.arange(seg.slot_T.numel()) % 5]
    for reward in (torch.full(seg.valid_GK.shape, 0.1), (index_GK % 2).float(), 1e8 * (index_GK % 3 - 1.0)):
        x = random_input(head, lengths, reward=reward.double())
        x = in_precision(change(x, policy_T=x.policy_T.detach() + shift_T), torch.float32)
        loss, grad_T = loss_and_grad(head, x)
        assert loss.isfinite().all()
        assert grad_T.isfinite().all()


@check
def gradient_is_the_derivative_unless_declared(head: Head) -> None:
    """A detach() that the head does not declare, or a declared one that is not there, fails."""
    found = [_exact(head, random_input(head, seed=seed)) for seed in range(3 if head.needs.stops_gradient else 1)]
    assert all(found) != head.needs.stops_gradient, f"gradient is the derivative: {all(found)}"


def _exact(head: Head, x: HeadInput) -> bool:
    names = [n for n in ("policy_T", "token_kl", "candidate", "privileged") if getattr(x, n) is not None]
    leaves = tuple(getattr(x, n).detach().requires_grad_(True) for n in names)

    def loss(*given: Tensor) -> Tensor:
        return head(change(x, **dict(zip(names, given, strict=True)))).loss

    return torch.autograd.gradcheck(loss, leaves, atol=1e-7, rtol=1e-5, raise_exception=False)


@check
def never_waits_for_the_device(head: Head) -> None:
    """Meta tensors have no values: .item(), bool(tensor) and data-dependent shapes raise here."""
    x = random_input(head)
    seg = Segments(x.seg.slot_T.to("meta"), x.seg.valid_GK.to("meta"))
    y = mapped(x, lambda _, t: t.to("meta"))
    y = y if y.progress is None else change(y, progress=y.progress.to("meta"))
    out = head(change(y, seg=seg, state={k: t.to("meta") for k, t in x.state.items()}))
    assert out.loss.device.type == "meta"


@check
def is_pure(head: Head) -> None:
    x = random_input(head)
    before = {k: t.clone() for k, t in tensors(x).items()}
    state = torch.get_rng_state()
    first, second = head(x).loss, head(x).loss
    assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state()), "the head draws random numbers"
    for k, t in tensors(x).items():
        assert_close(t, before[k], rtol=0, atol=0, equal_nan=True, msg=f"the head changes its input {k}")


@check
def the_unit_is_the_shape(head: Head) -> None:
    """The loss has the declared unit's shape, metrics the shape of some unit; metrics carry no gradient."""
    x = random_input(head)
    out = parts(head, x).outputs[0]
    assert out.loss.dtype == x.policy_T.dtype
    G, K = x.seg.valid_GK.shape
    for name, value in out.metrics.items():
        assert not value.requires_grad, f"{name} carries a gradient: detach it"
        assert value.is_floating_point(), name
        assert tuple(value.shape) in {(G,), (G, K), (x.policy_T.numel(),)}, name


@check
def a_group_ignores_its_neighbours(head: Head) -> None:
    if head.needs.couples_batch:
        return
    x = random_input(head)
    whole = head(x).loss
    alone = [head(only(x, g)).loss for g in range(x.seg.valid_GK.shape[0])]
    assert_close(whole, torch.cat(alone))


@check
def empty_places_change_nothing(head: Head) -> None:
    """A further slot without a response, or a whole group without any, whatever stands in its reward."""
    for reward in (1e6, math.nan):
        x = random_input(head)
        loss, grad_T = mean_and_grad(head, x)
        widened = [with_empty_group(x, reward)]
        if head.needs.layout in ("set", "best"):
            widened += [with_empty_slot(x, reward, at=0), with_empty_slot(x, reward, at=x.seg.valid_GK.shape[1])]
        for y in widened:
            assert_close(mean_and_grad(head, y), (loss, grad_T))


@check
def reads_what_it_declares(head: Head) -> None:
    """Without a declared input the head must fail by name: a Need that nothing reads only turns data away."""
    for field, need in (
        ("ref", "reference"),
        ("old", "behaviour"),
        ("token_kl", "token_kl"),
        ("reward", "reward"),
        ("label", "label"),
        ("embedding", "embedding"),
        ("collision", "collision"),
        ("differs", "differs"),
        ("teacher", "teacher"),
        ("candidate", "teacher"),
        ("teacher_ref", "teacher_ref"),
        ("prompt_embedding", "prompt_embedding"),
        ("mismatch", "mismatch"),
        ("row", "row"),
        ("privileged", "privileged"),
        ("correction", "correction"),
        ("progress", "progress"),
        ("columns", "columns"),
        ("response_columns", "response_columns"),
        ("token_columns", "token_columns"),
        ("gates", "hidden"),
    ):
        if getattr(head.needs, need):
            lacking = {} if field == "gates" or "columns" in field else None
            with pytest.raises(LookupError, match=rf"add {need}=.* to its Needs"):
                head(change(random_input(head), **{field: lacking}))


@check
def only_logratios_matter_unless_declared(head: Head) -> None:
    """The same shift of policy and reference changes nothing."""
    if head.needs.reference:
        x = random_input(head)
        shift_T = torch.linspace(-2, 3, x.policy_T.numel(), dtype=torch.float64)
        y = change(x, policy_T=x.policy_T.detach() + shift_T, ref=x.ref_T + shift_T)
        (loss, grad), (shifted, shifted_grad) = loss_and_grad(head, x), loss_and_grad(head, y)
        alike = torch.allclose(loss, shifted) and torch.allclose(grad, shifted_grad)
        assert alike != head.needs.raw_logps, f"only log-ratios matter: {alike}"


@check
def state_is_declared_and_kept(head: Head) -> None:
    """The next state has the names, shapes and types of the first one; an empty group does not touch it."""
    x = random_input(head)
    G = x.seg.valid_GK.shape[0]
    first, out = head.state(G), head(x)
    assert set(out.state) == set(first)
    assert head.needs.couples_batch or not first, "a head with state declares couples_batch"
    for name, t in out.state.items():
        assert not t.requires_grad, name
        assert t.shape == first[name].shape, name
        assert t.is_floating_point() == first[name].is_floating_point(), name
    for name, t in head(with_empty_group(x, math.nan)).state.items():
        assert_close(t, out.state[name])


@check
def start_is_the_loss_at_policy_equals_reference(head: Head) -> None:
    """And None is claimed only where that loss has no one value."""
    for K in (2, 3, 5):
        lengths = sizes(head, K)
        x = random_input(head, lengths, same=True)
        start = head.start(len(lengths[0]))
        loss = head(x).loss.detach()
        if start is not None:
            assert_close(loss, torch.full_like(loss, start))
        elif K == 5:
            assert loss.max() - loss.min() > 1e-6, f"start() is None, but the loss is always {loss.max():.6f}"


@check
def precision_does_not_decide(head: Head) -> None:
    """fp32 log-probs and rewards give the float64 loss and gradient to fp32 accuracy."""
    x = random_input(head)
    loss, grad_T = loss_and_grad(head, x)
    loss32, grad32_T = loss_and_grad(head, in_precision(x, torch.float32))
    assert loss32.dtype == torch.float32
    assert_close(loss32.double(), loss, rtol=2e-5, atol=2e-6)
    assert_close(grad32_T.double(), grad_T, rtol=2e-5, atol=2e-6)


def mean_and_grad(head: Head, x: HeadInput) -> tuple[Tensor, Tensor]:
    """The objective of this input alone, and its gradient."""
    policy_T = x.policy_T.detach().requires_grad_(True)
    loss = parts(head, change(x, policy_T=policy_T)).loss
    return loss.detach(), torch.autograd.grad(loss, policy_T)[0]


def in_precision(x: HeadInput, dtype: torch.dtype) -> HeadInput:
    y = mapped(x, lambda _, t: t.detach().to(dtype) if t.is_floating_point() else t)
    return y if y.progress is None else change(y, progress=y.progress.to(dtype))


def mapped(x: HeadInput, f: Callable[[str, Tensor], Tensor]) -> HeadInput:
    """f(kind, tensor) for all that a head reads but the segments, its state and the run's progress. kind: "T" for
    tokens, "grid" for responses, else a name."""
    kinds = dict.fromkeys(PER_TOKEN, "T") | {"progress": None}
    single = {k: f(kinds.get(k) or k, t) for k, t in tensors(x).items() if kinds.get(k, k)}
    named = {"columns": "column", "response_columns": "grid", "token_columns": "T", "gates": "T", "old_gates": "T"}
    several = {name: {k: f(kind, t) for k, t in getattr(x, name).items()} for name, kind in named.items()}
    return change(x, **single, **several)


def only(x: HeadInput, g: int) -> HeadInput:
    """One group as a batch of its own."""
    K = x.seg.valid_GK.shape[1]
    mine_T = x.seg.slot_T // K == g
    y = mapped(x, lambda kind, t: t[mine_T] if kind == "T" else t[g : g + 1])
    return change(y, seg=Segments(x.seg.slot_T[mine_T] - g * K, x.seg.valid_GK[g : g + 1]))


def with_empty_slot(x: HeadInput, reward: float, at: int) -> HeadInput:
    """Every group one place wider, with nothing at index `at`."""
    K = x.seg.valid_GK.shape[1]
    k_T = x.seg.slot_T % K
    slot_T = x.seg.slot_T // K * (K + 1) + k_T + (k_T >= at)
    fill = {"reward": reward, "label": 0, "embedding": reward, "grid": reward}
    y = mapped(x, lambda kind, t: insert(t, at, 1, fill[kind]) if kind in fill else t)
    return change(y, seg=Segments(slot_T, insert(x.seg.valid_GK, at, 1, False)))


def with_empty_group(x: HeadInput, reward: float) -> HeadInput:
    """A filler group in front, of which nothing counts."""
    fill = {"label": 0, "row": EMPTY_ROW}
    y = mapped(x, lambda kind, t: t if kind == "T" else insert(t, 0, 0, fill.get(kind, reward)))
    valid_GK = insert(x.seg.valid_GK, 0, 0, False)
    return change(y, seg=Segments(x.seg.slot_T + valid_GK.shape[1], valid_GK))


def insert(t: Tensor, at: int, dim: int, value: float) -> Tensor:
    gap = torch.full_like(t.narrow(dim, 0, 1), value)
    return torch.cat([t.narrow(dim, 0, at), gap, t.narrow(dim, at, t.shape[dim] - at)], dim)

"""Builds what a head reads, at random or from given numbers, for the tests of heads and of the objective."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import annotated_types as at
import torch
from torch import Tensor, nn

from po.objective import Parts, counted, objective, scope
from po.spec import Term
from po.types import Head, HeadInput, Needs, Segments

F64 = torch.float64
Lengths = Sequence[Sequence[int]]  # tokens of each response, per group; ragged

LENGTHS: dict[str, Lengths] = {
    "pair": ((3, 5), (1, 2), (4, 1)),
    "set": ((3, 1, 4, 2), (2, 5), (1, 1, 1), (6,)),
    "best": ((3, 1, 4, 2), (2, 5), (1,)),
    "unpaired": ((3,), (1,), (5,), (2,)),
    "labelled": ((3, 1, 4, 2), (2, 5), (1, 1, 1), (6,)),
}
PER_TOKEN = ("policy_T", "ref", "old", "token_kl", "collision", "differs", "candidate", "teacher", "teacher_ref")
PER_TOKEN += ("privileged", "correction")
EMPTY_ROW = -1  # row_G of a group that holds nothing


def segments(lengths: Lengths) -> Segments:
    """Lay responses out in a grid as wide as the largest group."""
    K = max(len(group) for group in lengths)
    slots = [[g * K + k] * n for g, group in enumerate(lengths) for k, n in enumerate(group)]
    valid = [[k < len(group) for k in range(K)] for group in lengths]
    return Segments(torch.tensor(list(itertools.chain(*slots)), dtype=torch.int64), torch.tensor(valid))


def grid(rows: Sequence[Sequence[float]], empty: float = torch.nan, dtype: torch.dtype = F64) -> Tensor:
    """Ragged numbers as (G, K), with `empty` where a group has no response."""
    K = max(len(row) for row in rows)
    return torch.tensor([[*row, *[empty] * (K - len(row))] for row in rows], dtype=dtype)


def random_input(
    head: Head | Needs,
    lengths: Lengths | None = None,
    seed: int = 0,
    same: bool = False,
    reward: Tensor | None = None,
) -> HeadInput:
    """Random float64 inputs with what the head (or bare Needs) declares and nothing else. same: policy == reference,
    and both are who sampled.

    The first of unpaired rows is desirable and the second not; so are the responses of labelled groups, the third and
    fourth unlabelled.
    """
    needs = head if isinstance(head, Needs) else head.needs
    rng = torch.Generator().manual_seed(seed)
    seg = segments(lengths or LENGTHS[needs.layout])
    T, (G, K) = seg.slot_T.numel(), seg.valid_GK.shape

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64)

    policy_T = -3 * noise(T).abs()
    other_T = policy_T.clone() if same else policy_T + noise(T)
    two = needs.reference and needs.behaviour and not same  # KL(mu || ref) is seen only where they differ
    old_T = policy_T + noise(T) if two else other_T
    score_GK = 2 * noise(G, K) if reward is None else reward
    sign_GK = torch.where(noise(G, K) > 0, 1, -1)
    if needs.layout == "labelled":
        sign_GK = (2 * noise(G, K)).round().clamp(-1, 1).long()
        sign_GK[:, :4] = torch.tensor([1, -1, 0, 0])[:K]
    if needs.layout == "unpaired":
        sign_GK[:2] = torch.tensor([[1], [-1]])[:G]
    x = HeadInput(
        seg=seg,
        policy_T=policy_T.requires_grad_(True),
        ref=other_T if needs.reference else None,
        old=old_T if needs.behaviour else None,
        token_kl=noise(T).abs() if needs.token_kl else None,
        reward=score_GK.masked_fill(~seg.valid_GK, torch.nan) if needs.reward else None,
        label=sign_GK.masked_fill(~seg.valid_GK, 0) if needs.label else None,
        embedding=noise(G, K, 3) if needs.embedding else None,
    )
    if same and needs.token_kl:
        x = change(x, token_kl=torch.zeros(T, dtype=F64))
    x = with_further_input(x, needs, noise, head if isinstance(head, Head) else None)
    return change(x, mismatch=torch.zeros(G, dtype=F64)) if same and needs.mismatch else x


def with_further_input(x: HeadInput, needs: Needs, noise: Callable[..., Tensor], head: Head | None) -> HeadInput:
    """What few heads read."""
    T, G = x.seg.slot_T.numel(), x.seg.valid_GK.shape[0]
    names = ("candidate", "teacher", *(["teacher_ref"] if needs.teacher_ref else [])) if needs.teacher else ()
    teacher = {name: noise(T, 3).log_softmax(-1) for name in names}
    module = None if head is None else head.build(4, 3)
    gates = {} if module is None else in_float64(module, noise(T, 3, 4))
    K = x.seg.valid_GK.shape[1]
    own = {name: (noise(G, K) > 0).to(F64) for name in needs.response_columns}
    return change(
        x,
        collision=-noise(T).abs() if needs.collision else None,
        differs=noise(T) > 0 if needs.differs else None,
        prompt_embedding=noise(G, 3) if needs.prompt_embedding else None,
        mismatch=noise(G) if needs.mismatch else None,
        row=torch.arange(G) if needs.row else None,
        privileged=-3 * noise(T).abs() if needs.privileged else None,
        correction=noise(T).abs() if needs.correction else None,
        progress=torch.tensor(0.1, dtype=F64) if needs.progress else None,
        columns={name: torch.linspace(0.1, 0.9, G, dtype=F64) for name in needs.columns},
        response_columns={name: t.masked_fill(~x.seg.valid_GK, torch.nan) for name, t in own.items()},
        token_columns={name: (noise(T) > 0).to(F64) for name in needs.token_columns},
        gates=gates,
        old_gates={k: (g + noise(T)).detach() for k, g in gates.items()} if needs.behaviour else {},
        state={} if head is None else {k: in_double(t) for k, t in head.state(G).items()},
        **teacher,
    )


def in_float64(module: nn.Module, hidden_TLD: Tensor) -> dict[str, Tensor]:
    """The gates of a head's own module on random hidden states, as leaves: their gradient is the head's business."""
    with torch.no_grad():
        gates = module.double().eval()(hidden_TLD)
    return {name: gate.requires_grad_(True) for name, gate in gates.items()}


def in_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def input_from_logratios(
    logratio: Sequence[Sequence[float]],
    reward: Sequence[Sequence[float]] | None = None,
    dtype: torch.dtype = F64,
    lengths: Lengths | None = None,
) -> HeadInput:
    """Responses with given log-ratios, spread evenly over their tokens (one each unless lengths are given)."""
    lengths = lengths or [[1] * len(row) for row in logratio]
    seg = segments(lengths)
    share = [v / n for row, sizes in zip(logratio, lengths, strict=True) for v, n in zip(row, sizes, strict=True)]
    counts = torch.tensor([n for sizes in lengths for n in sizes])
    logratio_T = torch.tensor(share, dtype=dtype).repeat_interleave(counts)
    ref_T = torch.full_like(logratio_T, -2.0)
    scores = None if reward is None else grid(reward, dtype=dtype)
    return HeadInput(seg, (ref_T + logratio_T).requires_grad_(True), ref=ref_T, reward=scores)


def change(x: HeadInput, **fields: Any) -> HeadInput:
    """A copy with other fields."""
    return dataclasses.replace(x, **fields)


def tensors(x: HeadInput) -> dict[str, Tensor]:
    """The given per-token and per-response tensors by field name."""
    named = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return {name: t for name, t in named.items() if isinstance(t, Tensor)}


def parts(head: Head, x: HeadInput) -> Parts:
    """The objective of this input alone: the mean over its own units."""
    over = scope(head.needs)
    named = {kind: {f"0.{name}": gate for name, gate in getattr(x, kind).items()} for kind in ("gates", "old_gates")}
    x = change(x, **named)
    return objective([Term(head)], x, {over: float(counted(x, over).sum())}, [x.state])


def loss_and_grad(head: Head, x: HeadInput) -> tuple[Tensor, Tensor]:
    """The un-reduced loss, and the gradient of its mean over units with respect to policy_T."""
    policy_T = x.policy_T.detach().requires_grad_(True)
    out = parts(head, change(x, policy_T=policy_T))
    (grad_T,) = torch.autograd.grad(out.loss, policy_T)
    return out.outputs[0].loss.detach(), grad_T


def within(value: float, hint: Any) -> bool:
    """Whether a number keeps the bounds of its Annotated type."""
    checks = {at.Gt: "__gt__", at.Ge: "__ge__", at.Lt: "__lt__", at.Le: "__le__"}
    bounds = [(m, n) for m in get_args(hint)[1:] for kind, n in checks.items() if isinstance(m, kind)]
    return all(getattr(float(value), name)(float(getattr(m, name.strip("_")))) for m, name in bounds)


def other_values(hint: Any, default: Any) -> list[Any]:
    """Other legal values of a field, read off its type."""
    if hint is bool:
        return [not default]
    if get_origin(hint) is Literal:
        return [v for v in get_args(hint) if v != default]
    if get_origin(hint) is Annotated:
        return [v for v in (0.3, 2.0) if v != default and within(v, hint)][:1]
    return []


def variants(cls: type[Head]) -> list[Head]:
    """The head as it comes, and once more for each other value of each of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return [cls(), *(cls(**{f.name: v}) for f in fields for v in other_values(hints[f.name], f.default))]


def name_of(head: Head) -> str:
    """For test ids: the class, and the fields that differ from their defaults."""
    changed = {f.name: getattr(head, f.name) for f in dataclasses.fields(head)}  # type: ignore[arg-type]
    defaults = dataclasses.asdict(type(head)())  # type: ignore[call-overload]
    return "-".join([type(head).__name__, *(f"{k}={v}" for k, v in changed.items() if v != defaults[k])])

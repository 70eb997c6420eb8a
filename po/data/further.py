"""What few heads read of a batch: columns, embeddings, edits and a teacher's log-probs, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from po.data.edits import edited
from po.data.groups import Group
from po.data.wanted import Wanted


def further(groups: Sequence[Group], K: int, wanted: Wanted) -> dict[str, Any]:
    """What few heads read. The data was checked to have it (`check_needs`)."""
    out: dict[str, Any] = {}
    examples = [g.example for g in groups]
    if wanted.row:
        out["row_G"] = torch.tensor([g.item.example if g.counts else -1 for g in groups])
    if wanted.columns:
        rows = [dict(e.columns) for e in examples]
        out["columns"] = {name: fp32([row[name] for row in rows]) for name in wanted.columns}
    if wanted.response_columns:
        out["response_columns"] = {name: _grid(groups, K, name) for name in wanted.response_columns}
    if wanted.token_columns:
        named = [dict(e.token_columns) for e in examples]
        out["token_columns"] = {
            name: fp32(list(chain.from_iterable(per_token(groups, [n[name] for n in named], 0.0))))
            for name in wanted.token_columns
        }
    if wanted.embedding:
        found = [[(e.embedding or ())[k] for k in g.item.responses] for e, g in zip(examples, groups)]
        empty = [0.0] * len(found[0][0])
        out["embedding_GKE"] = fp32([[*vectors, *[empty] * (K - len(vectors))] for vectors in found])
    if wanted.prompt_embedding:
        out["prompt_embedding_GE"] = fp32([e.prompt_embedding for e in examples])
    if wanted.differs:
        out["differs_T"] = torch.tensor(list(chain.from_iterable(_differs(groups))))
    if wanted.teacher:
        out |= _teacher(groups)
    return out


def _grid(groups: Sequence[Group], K: int, name: str) -> Tensor:
    """A number per response; 0 where there is none."""
    found = [[dict(g.example.response_columns)[name][k] for k in g.item.responses] for g in groups]
    return fp32([[*row, *[0.0] * (K - len(row))] for row in found])


def _differs(groups: Sequence[Group]) -> list[Sequence[bool]]:
    out: list[Sequence[bool]] = []
    for g in groups:
        a, b = g.item.responses
        out += [*edited(g.example.response_ids[a], g.example.response_ids[b]), [False] * len(g.other)]
    return out


def _teacher(groups: Sequence[Group]) -> dict[str, Tensor]:
    """ids as candidate_ids_TM with -1 where a token has fewer than M; log-probs with -inf there."""
    known: dict[str, list[Any]] = {
        "candidate_ids_TM": [g.example.teacher_ids for g in groups],
        "teacher_TM": [g.example.teacher_logps for g in groups],
        "teacher_ref_TM": [g.example.teacher_ref_logps for g in groups],
    }
    M = max(len(tokens) for part in per_token(groups, known["candidate_ids_TM"], ()) for tokens in part)
    out = {}
    for name, facts in known.items():
        if any(f is None for f in facts):  # only the teacher's reference is optional
            continue
        empty, dtype = (-1, torch.int64) if name == "candidate_ids_TM" else (-torch.inf, torch.float32)
        rows = [[*tokens, *[empty] * (M - len(tokens))] for part in per_token(groups, facts, ()) for tokens in part]
        out[name] = torch.tensor(rows, dtype=dtype)
    return out


def per_token(groups: Sequence[Group], facts: Sequence[Any], empty: Any) -> list[Sequence[Any]]:
    """A fact per token, given per example and response, of each group's responses in the stream's order; `empty` at
    each token of a mismatched one."""
    out: list[Sequence[Any]] = []
    for g, of_response in zip(groups, facts):
        out += [of_response[k] for k in g.item.responses]
        out.append([empty] * len(g.other))
    return out


def fp32(values: Any) -> Tensor:
    """A tensor of numbers in fp32."""
    return torch.tensor(values, dtype=torch.float32)

"""One micro-batch: a stream of tokens, and the (G, K) facts about its responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from po.data.further import fp32, further, per_token
from po.data.groups import Group, Groups, Pick
from po.data.rows import Example, Item
from po.data.wanted import NOTHING_MORE, Wanted, wanted
from po.forest import Forest, Padded, pad, plant
from po.pieces import Piece, split
from po.types import HeadInput, Segments

__all__ = ["Batch", "Collate", "Group", "Groups", "LookUp", "Pick", "Wanted", "moved", "wanted"]

_T = TypeVar("_T")
Laid = tuple[tuple[int, ...], list[tuple[int, ...]]]  # a prompt and responses, in token ids
LookUp = Callable[[Sequence[int], Sequence[int]], Any]  # prompt ids, response ids -> reference log-probs per token


@dataclass(frozen=True)
class Batch:
    """G groups. What is per token (..._T, ..._TM) is in the stream's order, over all T tokens of the stream: with a
    mismatch or privileged prompts that is more than the tokens of the heads' responses, which own_T picks out. Numbers
    are fp32.

    own_T: int64 positions in the stream's token order of what heads see; None where that is everything.
    privileged_T: of the same tokens, in the same order, after the privileged prompts.
    old_T: log-probs under the policy that sampled; sampler_T: those that the sampler itself recorded, of responses that
        this run has sampled. old_gates: the heads' own modules at that time. temperature: of all log-probs.
    other_U, other_group_U: the positions of the U mismatched tokens, and the group of each.
    candidate_ids_TM: what a teacher scored; -1, and -inf in teacher_TM and teacher_ref_TM, where it scored fewer.
    """

    stream: Forest | Padded
    seg: Segments  # of the heads' responses
    ids: tuple[str, ...]  # the row of each group
    ref_T: Tensor | None = None
    old_T: Tensor | None = None
    reward_GK: Tensor | None = None
    label_GK: Tensor | None = None
    best_first: bool = False  # pairs stand best first, whatever their rewards say
    own_T: Tensor | None = None
    privileged_T: Tensor | None = None
    other_U: Tensor | None = None
    other_group_U: Tensor | None = None
    row_G: Tensor | None = None  # int64, -1 for fillers
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (G,) each
    response_columns: Mapping[str, Tensor] = field(default_factory=dict)  # (G, K) each
    token_columns: Mapping[str, Tensor] = field(default_factory=dict)  # (T,) each
    embedding_GKE: Tensor | None = None
    prompt_embedding_GE: Tensor | None = None
    differs_T: Tensor | None = None  # bool
    candidate_ids_TM: Tensor | None = None
    teacher_TM: Tensor | None = None
    teacher_ref_TM: Tensor | None = None
    sampler_T: Tensor | None = None
    old_gates: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0
    from_privileged: bool = False  # this run sampled the responses from the privileged prompts
    pieces: tuple[Piece, ...] = ()  # the stream in parts, where it is more than one forward may hold

    def to(self, device: torch.device | str) -> Batch:
        """Move, never cast: HF's Trainer would round float inputs to bf16 under DeepSpeed (-734.3 becomes -736)."""
        return moved(self, device)

    def own(self, x_T: Tensor) -> Tensor:
        """What belongs to the heads' responses, in the order of seg: (T, ...) -> (tokens of seg, ...). No tokens at
        all stay none."""
        return x_T if self.own_T is None or not len(x_T) else x_T.index_select(0, self.own_T)

    def head_input(
        self,
        policy_T: Tensor,
        ref_T: Tensor | None,
        *,
        token_kl: Tensor | None = None,
        collision: Tensor | None = None,
        candidate: Tensor | None = None,
        gates: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Tensor] | None = None,
        correction: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> HeadInput:
        """What the heads see of this batch. All tensors per token are given over the whole stream, `correction` alone
        over the heads' tokens. An empty policy_T gives an input that is only good for counting its units."""

        def own(x_T: Tensor | None) -> Tensor | None:
            return None if x_T is None else self.own(x_T)

        return HeadInput(
            self.seg,
            self.own(policy_T),
            ref=own(ref_T),
            old=own(self.old_T),
            token_kl=own(token_kl),
            collision=own(collision),
            differs=own(self.differs_T),
            candidate=own(candidate),
            teacher=own(self.teacher_TM),
            teacher_ref=own(self.teacher_ref_TM),
            reward=self.reward_GK,
            label=self.label_GK,
            embedding=self.embedding_GKE,
            prompt_embedding=self.prompt_embedding_GE,
            mismatch=self._mismatch(policy_T, ref_T),
            row=self.row_G,
            privileged=self._privileged(policy_T),
            best_first=self.best_first,
            columns=self.columns,
            response_columns=self.response_columns,
            token_columns={name: self.own(x_T) for name, x_T in self.token_columns.items()},
            gates={name: self.own(gate_T) for name, gate_T in (gates or {}).items()},
            old_gates={name: self.own(gate_T) for name, gate_T in self.old_gates.items()},
            correction=correction,
            progress=progress,
            state=state or {},
        )

    def _privileged(self, policy_T: Tensor) -> Tensor | None:
        if self.privileged_T is None or not len(policy_T):
            return None
        return policy_T.index_select(0, self.privileged_T)

    def _mismatch(self, policy_T: Tensor, ref_T: Tensor | None) -> Tensor | None:
        if self.other_U is None or self.other_group_U is None or ref_T is None or not len(policy_T):
            return None
        logratio_U = (policy_T.detach() - ref_T).index_select(0, self.other_U)
        return logratio_U.new_zeros(len(self.ids)).index_add(0, self.other_group_U, logratio_U)


def moved(x: _T, device: torch.device | str) -> _T:
    """The tensors of a batch or a stream on a device, in their dtype."""
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)  # type: ignore[return-value]
    if isinstance(x, Mapping):
        return {k: moved(v, device) for k, v in x.items()}  # type: ignore[return-value]
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x) if f.init})
    return x


@dataclass(frozen=True)
class Collate:
    """Groups -> Batch. `reference` looks cached log-probs up; None where the trainer computes them or none are needed.
    `best_first`: the items are pairs. `wanted`: what the heads read beyond the ordinary. `max_tokens`: a
    micro-batch of more is split into pieces."""

    share_prefix: bool = True
    reference: LookUp | None = None
    best_first: bool = False
    wanted: Wanted = NOTHING_MORE
    max_tokens: int | None = None  # of one forward
    sampled: bool = False  # by this run, so that log-probs of rows are the sampler's own
    temperature: float = 1.0
    from_privileged: bool = False

    def __call__(self, groups: Sequence[Group | tuple[Example, Item, bool]]) -> Batch:
        every = [Group(*g) if self.wanted.mismatch else Group(*g[:3]) for g in groups]
        K = max(len(g.item.responses) for g in every)
        ids: list[Laid] = [(g.example.prompt_ids, [g.example.response_ids[k] for k in g.item.responses]) for g in every]
        valid_GK = torch.tensor([[g.counts and k < len(g.item.responses) for k in range(K)] for g in every])
        width = K
        if self.wanted.mismatch:
            assert all(g.other for g in every), "every item must have another row's response: arrange(mismatch=True)"
            ids, width = [(p, [*rs, g.other]) for (p, rs), g in zip(ids, every)], K + 1
        facts = further(every, K, self.wanted)
        if self.reference is not None:
            look = self.reference
            facts["ref_T"] = _flat([look(p, r) for p, rs in ids for r in rs])
        if all(g.example.logps is not None for g in every):
            logps_T = _flat(per_token(every, [g.example.logps for g in every], 0.0))
            facts["sampler_T" if self.sampled else "old_T"] = logps_T
        if self.wanted.privileged:
            ids = [*ids, *_privileged(every, ids)]
        lay = plant if self.share_prefix else pad
        stream = lay(ids, width)
        seg = Segments(stream.slot_T, valid_GK)
        if self.wanted.mismatch:
            seg, places = _apart(stream.slot_T, valid_GK, [len(g.item.responses) for g in every])
            facts |= places
        if self.wanted.privileged:
            own_T, privileged_T = torch.arange(len(stream.slot_T)).chunk(2)
            seg = Segments(stream.slot_T[: len(own_T)], valid_GK)
            facts = {name: _longer(name, x, len(own_T)) for name, x in facts.items()}
            facts |= {"own_T": own_T, "privileged_T": privileged_T}
        return Batch(
            stream,
            seg,
            tuple(g.example.id for g in every),
            reward_GK=_grid([_pick(g.example.reward, g.item) for g in every], K, torch.float32),
            label_GK=_grid([_pick(g.example.label, g.item) for g in every], K, torch.int64),
            best_first=self.best_first,
            temperature=self.temperature,
            from_privileged=self.from_privileged,
            pieces=() if self.max_tokens is None else split(ids, self.max_tokens, width, lay),
            **facts,
        )


def _privileged(every: Sequence[Group], ids: Sequence[Laid]) -> list[Laid]:
    """The same responses after the privileged prompts."""
    assert all(g.example.privileged_ids for g in every), "every row must have a privileged prompt: check_needs"
    return [(g.example.privileged_ids or (), responses) for g, (_, responses) in zip(every, ids)]


def _longer(name: str, x: Any, tokens: int) -> Any:
    """A fact per token, longer by empty places for the tokens after the privileged prompts; others as they are."""
    if isinstance(x, Mapping):
        return {k: _longer(name, t, tokens) for k, t in x.items()}
    if name != "token_columns" and not name.endswith(("_T", "_TM")):
        return x
    empty = {"candidate_ids_TM": -1, "teacher_TM": -torch.inf, "teacher_ref_TM": -torch.inf}.get(name, 0)
    return torch.cat([x, x.new_full((tokens, *x.shape[1:]), empty)])


def _apart(slot_T: Tensor, valid_GK: Tensor, counts: Sequence[int]) -> tuple[Segments, dict[str, Any]]:
    """The heads' segments of a stream whose groups end with a mismatched response, and where either's tokens are."""
    K = valid_GK.shape[1]
    g_T, k_T = slot_T // (K + 1), slot_T % (K + 1)
    is_other_T = k_T == torch.tensor(counts)[g_T]
    own_T, other_U = (~is_other_T).nonzero()[:, 0], is_other_T.nonzero()[:, 0]
    seg = Segments((g_T * K + k_T)[own_T], valid_GK)
    return seg, {"own_T": own_T, "other_U": other_U, "other_group_U": g_T[other_U]}


def _grid(values: Sequence[Sequence[float] | None], K: int, dtype: torch.dtype) -> Tensor | None:
    if any(v is None for v in values):
        return None
    rows = [[*v, *[0] * (K - len(v))] for v in values if v is not None]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


def _pick(values: Sequence[float] | None, item: Item) -> list[float] | None:
    return None if values is None else [values[k] for k in item.responses]


def _flat(parts: Sequence[Any]) -> Tensor:
    return fp32([x for p in parts for x in p])

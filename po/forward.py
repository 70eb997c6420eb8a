"""One look at a micro-batch: log-probs of the policy and its reference, and what else the recipe's heads read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from po.batch import Batch
from po.behaviour import correction, with_behaviour
from po.logprob import Scores, Want, score
from po.pieces import Piece
from po.ref_kinds import Reference
from po.spec import Correction, RolloutSpec, Term
from po.types import HeadInput


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Seen(NamedTuple):
    """What came of a batch. logp_T is in the stream's order; scores are those of the heads' responses."""

    x: HeadInput
    scores: Scores
    batch: Batch  # with the reference's log-probs
    logp_T: Tensor


class Forward:
    """Runs the policy over a batch, and the reference where a head reads it and the batch does not bring it."""

    def __init__(self, terms: Sequence[Term], reference: Reference | None, rollout: RolloutSpec | None = None) -> None:
        needs = [t.head.needs for t in terms]
        self._reference = reference if any(n.any_reference for n in needs) else None
        self._live = any(n.live_reference for n in needs)
        self._kl = any(n.token_kl for n in needs)
        self._ref_hidden = any(n.hidden == "ref" for n in needs)
        self._gates = any(n.hidden is not None for n in needs)
        self._collision = any(n.collision for n in needs)
        self._corrects = any(n.correction for n in needs)
        self._progresses = any(n.progress for n in needs)
        self._asked: tuple[Correction, float] = (
            ("none", 1.0) if rollout is None else (rollout.correction, rollout.correction_cap)
        )
        self.progress = 0.0  # the share of the run's steps that are done

    def __call__(self, model: nn.Module, batch: Batch) -> Seen:
        """The whole batch, with gradient where that is on; a batch in pieces is for looking only."""
        if batch.pieces:
            assert not torch.is_grad_enabled(), "a batch in pieces is trained piece by piece"
            found = [self._score(model, batch, p) for p in batch.pieces]
            T = batch.stream.target_T.numel()
            scores: Scores = _together([s for s, _ in found], batch.pieces, T)
            ref_T = _together([r for _, r in found], batch.pieces, T)
        else:
            scores, ref_T = self._score(model, batch, None)
        batch = with_behaviour(replace(batch, ref_T=ref_T), scores.logp_T, scores.gates)
        own = scores._replace(entropy_T=batch.own(scores.entropy_T), correct_T=batch.own(scores.correct_T))
        return Seen(self._input(batch, scores), own, batch, scores.logp_T)

    def piece(self, model: nn.Module, batch: Batch, piece: Piece | None) -> Scores:
        """One piece with gradient, in the piece's order; None: the one stream of a batch that has no pieces."""
        return self._score(model, batch, piece)[0]

    def _input(self, batch: Batch, scores: Scores) -> HeadInput:
        return batch.head_input(
            scores.logp_T,
            batch.ref_T,
            token_kl=scores.token_kl_T,
            collision=scores.collision_T,
            candidate=scores.candidate_TM,
            gates=scores.gates,
            correction=correction(batch, *self._asked) if self._corrects else None,
            progress=scores.logp_T.new_tensor(self.progress) if self._progresses else None,
        )

    def _score(self, model: nn.Module, batch: Batch, piece: Piece | None) -> tuple[Scores, Tensor | None]:
        """Scores and the reference's log-probs of a piece, or of the one stream."""
        stream = batch.stream if piece is None else piece.stream
        ref_T, ids_TM = _cut(batch.ref_T, piece), _cut(batch.candidate_ids_TM, piece)
        want = Want(batch.temperature, entropy=True, collision=self._collision, candidate_TM=ids_TM, gates=self._gates)
        if self._reference is not None and (ref_T is None or self._live):
            one = replace(batch, stream=stream, ref_T=ref_T, pieces=())
            said = self._reference.parts(model, one, hidden=self._ref_hidden, kl=self._kl)
            ref_T = said.logp_T
            want = replace(want, kl_against=said.against, ref_hidden_TLD=said.hidden_TLD)
        return score(model, stream, want), ref_T


def _cut(x_T: Tensor | None, piece: Piece | None) -> Tensor | None:
    return x_T if x_T is None or piece is None else x_T.index_select(0, piece.index_T)


def _together(found: Sequence[Any], pieces: Sequence[Piece], T: int) -> Any:
    """What pieces gave, in the order of the batch: tensors, and tuples and mappings of them."""
    first = found[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {name: _together([f[name] for f in found], pieces, T) for name in first}
    if isinstance(first, tuple):
        return type(first)(*(_together(list(fields), pieces, T) for fields in zip(*found, strict=True)))
    out = first.new_empty(T, *first.shape[1:])
    for piece, part in zip(pieces, found, strict=True):
        out[piece.index_T] = part
    return out

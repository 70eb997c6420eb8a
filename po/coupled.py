"""The optimizer step taken together: all groups seen ahead, one call of the heads, then one backward pass at a time.

For heads that couple the groups of a step, and for micro-batches that are too large for one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from po.batch import Batch
from po.behaviour import sampling_metrics
from po.even import even
from po.forward import Forward, Seen
from po.logprob import Scores
from po.metrics import Metric, preference_metrics, token_metrics
from po.objective import Scope
from po.pieces import Piece
from po.ranks import rank, ranks
from po.spec import Term
from po.types import HeadInput
from po.whole import Share, State, Whole, for_other_rows, moved, signals, whole

_FILE = "head_state.safetensors"
Backward = Callable[[], Tensor]  # one forward; what to run backward from


class Work(NamedTuple):
    """One micro-batch of a step taken together."""

    x: HeadInput  # what the heads saw of it, without gradient
    value: Tensor  # what the trainer logs of it: the step's objective over the micro-batches of a rank
    parts: list[Backward]  # its share of the step's loss (times the ranks), as a sum


class Coupled:
    """What the trainer hands over for such steps. With several micro-batches or pieces a step, the first one looks
    ahead at all of them without gradient; each is then computed again from the same random numbers (dropout). One
    forward more buys exactness whatever the split; with one stream a step it is not needed."""

    def __init__(
        self,
        terms: Sequence[Term],
        rows: int,
        device: torch.device,
        forward: Forward,
        record: Callable[[Iterable[Metric]], None],
        splits: bool = False,
    ) -> None:
        """rows: how many the training data has. splits: micro-batches may come in pieces."""
        self._terms, self._device, self._splits = terms, device, splits
        self._forward, self._record = forward, record
        self.states: list[State] = [moved(t.head.state(rows), device) for t in terms]
        self._step: list[Batch] = []
        self._ahead: list[tuple[Share, Batch, _Random]] = []

    def begin(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches of the next optimizer step; returned as what is to be trained."""
        self._step, self._ahead = self.even(batches), []
        return self._step

    def even(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same with as many pieces on every rank: ZeRO-3's forwards talk to each other."""
        return even(batches) if self._splits else list(batches)

    def work(self, model: nn.Module, batch: Batch, counts: Mapping[Scope, float]) -> Work:
        """What there is to do for this micro-batch. Every rank gets as many parts, each with a forward of its own."""
        if len(self._step) == 1 and not self._splits:
            seen = self._forward(model, batch)
            (share,) = self._take([seen], counts)
            return Work(share.x, share.value, [partial(share.loss, signals(seen.x), ranks())])
        self._ahead = self._ahead or self._look_ahead(model, counts)
        share, batch, random = self._ahead.pop(0)
        random.restore()
        nothing = torch.zeros_like(share.value)
        pull = replace(share, grad=_everywhere(share.grad, batch), value=nothing)
        pieces = batch.pieces or (None,)
        parts: list[Backward] = [partial(self._part, model, batch, p, pull) for p in pieces]
        return Work(share.x, share.value, [*parts[:-1], lambda: parts[-1]() + share.value])

    def _part(self, model: nn.Module, batch: Batch, piece: Piece | None, share: Share) -> Tensor:
        """A piece's part of a micro-batch's share; `share` in the order of the whole stream."""
        scores = self._forward.piece(model, batch, piece)
        if piece is not None:
            cut = {k: g[piece.index_T] * (not piece.idle) for k, g in share.grad.items()}
            share = replace(share, grad=cut)
        return share.loss(_signals(scores), ranks())

    @torch.no_grad()
    def _look_ahead(self, model: nn.Module, counts: Mapping[Scope, float]) -> list[tuple[Share, Batch, _Random]]:
        random, seen = [], []
        for batch in self._step:
            random.append(_Random())
            seen.append(self._forward(model, batch.to(self._device)))
        return list(zip(self._take(seen, counts), [s.batch for s in seen], random, strict=True))

    def _take(self, seen: Sequence[Seen], counts: Mapping[Scope, float]) -> tuple[Share, ...]:
        """One call of the heads for all groups of the step."""
        step = whole(self._terms, [s.x for s in seen], counts, self.states)
        self.states = [out.state for out in step.parts.outputs]
        self._log(step, seen)
        return step.shares

    def _log(self, step: Whole, seen: Sequence[Seen]) -> None:
        """Rank 0 keeps the books of what all ranks know alike."""
        if rank() == 0:
            self._record(preference_metrics(step.x, self._terms, step.parts))
        for s in seen:
            self._record(token_metrics(s.x, self._terms, s.scores))
            self._record(sampling_metrics(s.batch))

    def evaluate(self, seen: Sequence[Seen], counts: Mapping[Scope, float], rows: int) -> None:
        """Record the metrics of evaluation rows, taken together; the states stay as they are."""
        states = [for_other_rows(t, s, rows) for t, s in zip(self._terms, self.states, strict=True)]
        self._log(whole(self._terms, [s.x for s in seen], counts, states), seen)

    def save(self, folder: Path) -> None:
        """Beside a checkpoint's weights; the ranks' states are equal."""
        flat = {f"{i}.{k}": t.contiguous() for i, s in enumerate(self.states) for k, t in s.items()}
        if rank() == 0 and flat:
            save_file({k: t.cpu() for k, t in flat.items()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote. The names and shapes are those of this run: `check_same` has compared heads and rows."""
        if any(self.states):
            flat = load_file(folder / _FILE)
            self.states = [{k: flat[f"{i}.{k}"].to(self._device) for k in s} for i, s in enumerate(self.states)]


def _everywhere(grads: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Gradients over the heads' own tokens as ones over the whole stream, where log-probs of the responses after their
    prompts and after their privileged prompts are one signal."""
    if batch.own_T is None:
        return dict(grads)

    def spread(g: Tensor, at_T: Tensor) -> Tensor:
        return g.new_zeros(batch.stream.target_T.numel(), *g.shape[1:]).index_copy(0, at_T, g)

    out = {name: spread(g, batch.own_T) for name, g in grads.items() if name != "privileged"}
    if "privileged" in grads:
        assert batch.privileged_T is not None
        after_T = spread(grads["privileged"], batch.privileged_T)
        out["policy_T"] = out["policy_T"] + after_T if "policy_T" in out else after_T
    return out


def _signals(scores: Scores) -> dict[str, Tensor]:
    """What of a stream's scores carries gradient, under the names of `po.whole.signals`."""
    named = {"policy_T": scores.logp_T, "token_kl": scores.token_kl_T, "candidate": scores.candidate_TM}
    gates = {f"gates.{name}": gate for name, gate in (scores.gates or {}).items()}
    return {name: t for name, t in named.items() if t is not None} | gates


class _Random:
    """The generators' states at the time it is made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

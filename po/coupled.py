"""The optimizer step of heads that couple its groups: seen ahead, taken together, then one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from po.batch import Batch
from po.logprob import Scores
from po.metrics import Metric, preference_metrics, token_metrics
from po.objective import Scope
from po.ranks import rank, ranks
from po.spec import Term
from po.types import HeadInput
from po.whole import Share, State, Whole, for_other_rows, moved, signals, whole

_FILE = "head_state.safetensors"
Refer = Callable[[nn.Module, Batch], Batch]  # fills the reference's log-probs in
See = Callable[[nn.Module, Batch], tuple[HeadInput, Scores]]  # one forward of the policy


class Coupled:
    """What the trainer hands over for such heads. With several micro-batches a step, the first one looks ahead at all
    of them without gradient; each is then computed again from the same random numbers (dropout). One forward more buys
    exactness whatever the split; with one micro-batch it is not needed."""

    def __init__(
        self,
        terms: Sequence[Term],
        rows: int,
        device: torch.device,
        refer: Refer,
        see: See,
        record: Callable[[Iterable[Metric]], None],
    ) -> None:
        self._terms, self._device = terms, device
        self._refer, self._see, self._record = refer, see, record
        self.states: list[State] = [moved(t.head.state(rows), device) for t in terms]
        self._step: Sequence[Batch] = ()
        self._ahead: list[tuple[Share, Batch, _Random]] = []

    def begin(self, batches: Sequence[Batch]) -> None:
        """The micro-batches of the next optimizer step."""
        self._step, self._ahead = batches, []

    def loss(self, model: nn.Module, batch: Batch, counts: Mapping[Scope, float]) -> tuple[HeadInput, Tensor]:
        """What the heads saw of this micro-batch, and its share of the step's loss, times the ranks."""
        if len(self._step) == 1:
            x, scores = self._see(model, self._refer(model, batch))
            (share,) = self._take([x], [scores], counts)
        else:
            self._ahead = self._ahead or self._look_ahead(model, counts)
            share, batch, random = self._ahead.pop(0)
            random.restore()
            x, _ = self._see(model, batch)
        return share.x, share.loss(signals(x), ranks())

    @torch.no_grad()
    def _look_ahead(self, model: nn.Module, counts: Mapping[Scope, float]) -> list[tuple[Share, Batch, _Random]]:
        batches = [self._refer(model, b.to(self._device)) for b in self._step]
        random, seen = [], []
        for batch in batches:
            random.append(_Random())
            seen.append(self._see(model, batch))
        shares = self._take([x for x, _ in seen], [s for _, s in seen], counts)
        return list(zip(shares, batches, random, strict=True))

    def _take(
        self, xs: Sequence[HeadInput], scores: Sequence[Scores], counts: Mapping[Scope, float]
    ) -> tuple[Share, ...]:
        """One call of the heads for all groups of the step."""
        step = whole(self._terms, xs, counts, self.states)
        self.states = [out.state for out in step.parts.outputs]
        self._log(step, xs, scores)
        return step.shares

    def _log(self, step: Whole, xs: Sequence[HeadInput], scores: Sequence[Scores]) -> None:
        """Rank 0 keeps the books of what all ranks know alike."""
        if rank() == 0:
            self._record(preference_metrics(step.x, self._terms, step.parts))
        for x, s in zip(xs, scores, strict=True):
            self._record(token_metrics(x, self._terms, s))

    def evaluate(self, seen: Sequence[tuple[HeadInput, Scores]], counts: Mapping[Scope, float], rows: int) -> None:
        """Record the metrics of evaluation rows, taken together; the states stay as they are."""
        xs = [x for x, _ in seen]
        states = [for_other_rows(t, s, rows) for t, s in zip(self._terms, self.states, strict=True)]
        self._log(whole(self._terms, xs, counts, states), xs, [s for _, s in seen])

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


class _Random:
    """The generators' states at the time it is made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

"""Filling, reading and probing the store of reference log-probs."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from po.batch import Groups, moved
from po.data.rows import Example, Item, Other
from po.errors import NumericsError
from po.forest import pad, plant
from po.logp_store import Logps, LogpStore, response_key
from po.logprob import score

_TOKENS = 8192  # of a micro-batch; a longer response is scored alone
_SAVE_AFTER = 120.0  # seconds of work that a kill may lose
_SAVE_TOKENS = 4 << 20
_T = TypeVar("_T")


class Tolerance(NamedTuple):
    """How far two computations of the same log-probs may lie apart, in nats."""

    largest: float  # of one token
    mean: float  # over many tokens

    def allows(self, gap_T: Tensor) -> bool:
        """Whether differences (T,) are rounding. Few tokens may have a larger mean. False for NaN."""
        mean = self.mean * (1 + 10 / max(gap_T.numel(), 1) ** 0.5)
        return gap_T.numel() == 0 or bool((gap_T.max() <= self.largest) & (gap_T.mean() <= mean))


def tolerance(dtype: torch.dtype) -> Tolerance:
    """By the dtype that computes: several times what batches of another shape change for the same weights and tokens
    (measured in docs/reference.md), and below what another model changes."""
    if dtype == torch.bfloat16:
        return Tolerance(2.0, 0.08)
    return Tolerance(0.5, 0.02) if dtype == torch.float16 else Tolerance(1e-3, 1e-4)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that takes part in a forward: autocast's where it is on, else that of the parameters or that
    which 4-bit layers compute in."""
    parameter = next(model.parameters())
    if torch.is_autocast_enabled(parameter.device.type):
        return torch.get_autocast_dtype(parameter.device.type)
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    floats |= {d for m in model.modules() if isinstance(d := getattr(m, "compute_dtype", None), torch.dtype)}
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps)


class Work(NamedTuple):
    """Responses of one prompt that are still to be computed."""

    groups: int
    item: Item
    tokens: int


class RefCache:
    """A store, and the model that can fill it. `lookup` is what `Collate` takes."""

    def __init__(self, store: LogpStore, share_prefix: bool, autocast: torch.dtype | None) -> None:
        self.store = store
        self.share_prefix = share_prefix
        self.autocast = autocast

    def lookup(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Logps:
        """The log-probs of a response's tokens. KeyError where they were never computed."""
        return self.store[response_key(prompt_ids, response_ids)]

    def missing(self, groups: Sequence[Groups]) -> list[Work]:
        """What the items need and the store has not, each response once, the longest first."""
        todo: list[Work] = []
        seen: set[str] = set()
        for g, group in enumerate(x.light() for x in groups):
            wanted: dict[int, tuple[set[int], list[Other]]] = {}
            for item in group.items:
                responses, others = wanted.setdefault(item.example, (set(), []))
                responses.update(item.responses)
                others += [item.other] if item.other is not None else []
            for i, (responses, others) in wanted.items():
                e = group.examples[i]
                new = [k for k in sorted(responses) if self._is_new(e.prompt_ids, e.response_ids[k], seen)]
                works = self._works(g, i, new, len(e.prompt_ids), [len(r) for r in e.response_ids])
                for other in others:
                    if self._is_new(e.prompt_ids, group.ids_of(other), seen):
                        self._add_other(works, Work(g, Item(i, (), other), len(e.prompt_ids) + other.tokens))
                todo += works
        return sorted(todo, key=lambda work: -work.tokens)

    def _is_new(self, prompt_ids: Sequence[int], response_ids: Sequence[int], seen: set[str]) -> bool:
        """Whether a response is neither stored nor asked for before; from now on it is."""
        key = response_key(prompt_ids, response_ids)
        if key in self.store or key in seen:
            return False
        seen.add(key)
        return True

    def _works(self, g: int, example: int, responses: list[int], prompt: int, lengths: list[int]) -> list[Work]:
        """One piece of work per prompt, or one per response where they do not fit a micro-batch together."""
        longest = max((lengths[k] for k in responses), default=0)
        shared = prompt + sum(lengths[k] for k in responses)
        tokens = shared if self.share_prefix else len(responses) * (prompt + longest)
        if tokens <= _TOKENS:
            return [Work(g, Item(example, tuple(responses)), tokens)] if responses else []
        return [Work(g, Item(example, (k,)), prompt + lengths[k]) for k in responses]

    def _add_other(self, works: list[Work], one: Work) -> None:
        """Another row's response goes with the last of its prompt's works where there is room in it."""
        if works and works[-1].item.other is None and works[-1].tokens + one.tokens <= _TOKENS:
            last = works.pop()  # where the prompt is shared, these are too many tokens by the prompt's
            one = last._replace(item=replace(last.item, other=one.item.other), tokens=last.tokens + one.tokens)
        works.append(one)

    def fill(self, net: nn.Module, groups: Sequence[Groups], todo: Sequence[Work], rank: int, world: int) -> None:
        """Compute this rank's share of the work and store it as it comes. NumericsError where a log-prob is NaN."""
        from rich.console import Console
        from rich.progress import Progress

        mine = todo[rank::world]
        new: dict[str, Logps] = {}
        saved = time.monotonic()
        with Progress(console=Console(stderr=True), disable=rank > 0) as progress:
            bar = progress.add_task("reference log-probs", total=sum(work.tokens for work in mine))
            try:
                for works in _micro_batches(mine):
                    new |= self.score(net, groups, works)
                    progress.advance(bar, sum(work.tokens for work in works))
                    if time.monotonic() - saved > _SAVE_AFTER or sum(map(len, new.values())) > _SAVE_TOKENS:
                        self.store.add(new)
                        new, saved = {}, time.monotonic()
            finally:
                self.store.add(new)

    @torch.no_grad()
    def score(self, net: nn.Module, groups: Sequence[Groups], works: Sequence[Work]) -> dict[str, Logps]:
        """The log-probs of some works, by key, from the live model."""
        device = next(net.parameters()).device
        rows = [_sequences(groups[w.groups], w.item) for w in works]
        plan = plant if self.share_prefix else pad
        stream = plan([(e.prompt_ids, [ids for ids, _ in named]) for e, named in rows], max(len(n) for _, n in rows))
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            logp_T = score(net, moved(stream, device)).logp_T.float().cpu()
        each = [(e, ids, name) for e, named in rows for ids, name in named]
        found: dict[str, Logps] = {}
        for (e, ids, name), one_T in zip(each, logp_T.split([len(ids) for _, ids, _ in each])):
            if not one_T.isfinite().all():
                raise NumericsError(
                    f"reference: the log-prob of token {int((~one_T.isfinite()).nonzero()[0])} of {name} of row "
                    f"{e.where} is {one_T[~one_T.isfinite()][0].item()}; expected a finite number. The reference "
                    "model's weights or its dtype are unfit (float16 overflows where bfloat16 does not)"
                )
            found[response_key(e.prompt_ids, ids)] = one_T.numpy()
        return found

    def probe(self, net: nn.Module, groups: Sequence[Groups], rng: random.Random, n: int = 8) -> float:
        """Recompute n random rows with the live model, in other batches than the ones that filled the store.

        Returns the largest difference in nats. NumericsError naming the worst row where it is more than rounding.
        """
        every = [Work(g, item, 0) for g, x in enumerate(groups) for item in _sample(x.items, n, rng)]
        limit = tolerance(self.autocast or compute_dtype(net))
        worst = 0.0
        bad: list[tuple[float, str]] = []
        for work in _sample(every, n, rng):
            example, named = _sequences(groups[work.groups], work.item)
            live = self.score(net, groups, [work])
            for ids, name in named:
                key = response_key(example.prompt_ids, ids)
                one_T, kept_T = torch.from_numpy(live[key]), torch.tensor(self.store[key])
                gap_T = (one_T - kept_T).abs() if one_T.shape == kept_T.shape else torch.full((1,), torch.inf)
                worst = max(worst, gap_T.max().item())
                if not limit.allows(gap_T):
                    t = int(gap_T.argmax())
                    found = f"stored {kept_T[t]:.4f}, computed {one_T[t]:.4f}, at token {t} of {name}"
                    bad.append((gap_T.max().item(), f"row {example.where}: {found}"))
        if bad:
            raise NumericsError(
                f"reference: the log-probs in {self.store.folder} are not the reference model's. {max(bad)[1]}; "
                f"expected at most {limit.largest:g} between them. {len(bad)} responses of {n} random rows differ. "
                "Delete that folder to have them computed again; if it comes back, the model computes unsteadily"
            )
        return worst


def _sequences(groups: Groups, item: Item) -> tuple[Example, list[tuple[tuple[int, ...], str]]]:
    """An item's example, and what is scored after its prompt: token ids and a name for messages."""
    example = groups.examples[item.example]
    named = [(example.response_ids[k], f"response {k}") for k in item.responses]
    if item.other is not None:
        named.append((groups.ids_of(item.other), "another row's response after the prompt"))
    return example, named


def _sample(items: Sequence[_T], n: int, rng: random.Random) -> list[_T]:
    return [items[i] for i in rng.sample(range(len(items)), min(n, len(items)))]


def _micro_batches(works: Sequence[Work]) -> Iterator[list[Work]]:
    batch: list[Work] = []
    for work in works:
        if batch and sum(w.tokens for w in batch) + work.tokens > _TOKENS:
            yield batch
            batch = []
        batch.append(work)
    if batch:
        yield batch

"""Rounds of sampling for the trainer: asks for prompts in, batches of sampled responses out.

Nothing is sampled twice: a group is in the journal before it is trained on, and a run that goes on after a kill reads
what is there. Samples are at most `steps_per_generation * num_iterations - 1` optimizer steps old.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from po.batch import Batch, Collate
from po.data.groups import Group
from po.data.layout import items_of
from po.data.rows import Example, Item
from po.errors import UserError
from po.forward import Forward
from po.metrics import Metric
from po.ranks import gather, on_any, rank, ranks
from po.rollout.draw import Draw, Place
from po.rollout.journal import Journal
from po.rollout.rounds import Ask, Micro
from po.rollout.stats import group_metrics
from po.rollout.written import Written, as_example
from po.spec import DataSpec, RolloutSpec
from po.types import Layout

Record = Callable[[Iterable[Metric]], None]


class Rollouts:
    """Samples, rewards and arranges the groups of each round, on every rank those of its own prompts."""

    def __init__(
        self,
        spec: RolloutSpec,
        data: DataSpec,
        draw: Draw,
        journal: Journal,
        prompts: Sequence[Example],
        layout: Layout,
        collate: Collate,
        *,
        least: int,
        tokenizer: str,
        seed: int,
    ) -> None:
        """least: how many scored responses a group must have to count. tokenizer: its key, which rows carry."""
        self.spec, self._data, self._draw, self._journal = spec, data, draw, journal
        self._prompts, self._layout, self._collate = prompts, layout, collate
        self._least, self._tokenizer, self._seed = least, tokenizer, seed
        self._round: int | None = None
        self._batches: list[Batch] = []

    def batches(self, model: nn.Module, asks: Sequence[Ask], forward: Forward, record: Record) -> list[Batch]:
        """The micro-batches of an optimizer step. The first step of a round samples all of its prompts. model: what the
        trainer holds. Raises UserError where rewards fail on more samples than the recipe allows."""
        ask = asks[0]
        if ask.round != self._round:
            self._batches = []  # free the last round first
            self._batches = self._make(model, ask, forward, record)
            self._round = ask.round
        age = torch.tensor([float(ask.age)])
        record([("rollout/staleness", age, None)])
        return [self._batches[a.micro] for a in asks]

    def _make(self, model: nn.Module, ask: Ask, forward: Forward, record: Record) -> list[Batch]:
        start = time.perf_counter()
        places = [_places(ask.round, m) for m in ask.micros]
        counts = {p: c for m, ps in zip(ask.micros, places) for p, (_, c) in zip(ps, m.picks)}
        self._draw.update(model)
        found = self._written([p for ps in places for p in ps])
        self._check_scored(ask.round, [w for p, w in found.items() if counts[p]])
        metrics = list(group_metrics([w for p, w in found.items() if counts[p]], self.spec))
        if self.spec.zero_variance != "keep":
            counts |= {p: False for p, w in found.items() if w.flat}
        if self.spec.zero_variance == "refill":
            found, counts = self._refill(ask, found, counts, record)
        sampled = time.perf_counter() - start
        batches = [self._batch([found[p] for p in ps], [counts[p] for p in ps]) for ps in places]
        if self.spec.steps_per_generation * self.spec.num_iterations > 1:
            batches = [_looked_at(model, b, forward) for b in batches]
        record([*metrics, ("perf/sampling_s", torch.tensor([sampled], dtype=torch.float64), None)])
        return batches

    def _written(self, places: Sequence[Place]) -> dict[Place, Written]:
        """The groups of these places, from the journal where it has them."""
        missing = [p for p in places if (p.round, p.place) not in self._journal]
        size = max(1, self.spec.sequences_per_call // self.spec.num_generations)
        for n in range(max(gather(-(-len(missing) // size)))):  # ZeRO-3: every rank calls as often
            some = missing[n * size : (n + 1) * size]
            prompts = [self._prompts[p.example] for p in some]
            made = self._draw(prompts, some)
            self._journal.write([w.to_json(e, self._tokenizer) for e, w in zip(prompts, made, strict=True)])
        return {p: Written.from_json(self._journal.read((p.round, p.place))) for p in places}

    def _refill(
        self, ask: Ask, found: dict[Place, Written], counts: dict[Place, bool], record: Record
    ) -> tuple[dict[Place, Written], dict[Place, bool]]:
        """Other prompts for groups whose rewards are equal, as far as the budget goes."""
        flat = [p for p, w in found.items() if w.flat]
        budget, spent = int(self.spec.refill_budget * len(found)), 0
        reserve = self._reserve(ask, {p.example for p in found})
        while on_any(torch.tensor(bool(flat) and spent < budget and bool(reserve))):
            n = min(len(flat), budget - spent, len(reserve))
            new = list(self._written([reserve.pop(0) for _ in range(n)]).values())
            spent += n
            for w in new:
                if not w.flat and len(w.scored) >= self._least:
                    place = flat.pop(0)
                    found[place], counts[place] = w, True
        record([("rollout/refilled", torch.tensor([float(spent)]), None)])
        return found, counts

    def _reserve(self, ask: Ask, taken: set[int]) -> list[Place]:
        """Further prompts of this rank for a round: all others, shuffled by seed and round, at places of their own."""
        rng = torch.Generator().manual_seed(self._seed * 1_000_003 + ask.round + 1)
        order = torch.randperm(len(self._prompts), generator=rng).tolist()
        behind = 1_000_000_000
        mine = [(behind + i, k) for i, k in enumerate(order) if i % ranks() == rank() and k not in taken]
        return [Place(ask.round, place, k) for place, k in mine]

    def _batch(self, groups: Sequence[Written], counts: Sequence[bool]) -> Batch:
        """The groups in the heads' layout; one with nothing to compare stays as a filler that counts for nothing."""
        made: list[Group] = []
        for w, counted in zip(groups, counts):
            prompt = self._prompts[w.example]
            enough = len(w.scored) >= self._least
            example = as_example(
                prompt, w.scored if enough else w.answers, getattr(self._collate.wanted, "response_columns", ())
            )
            items: list[Item] = []
            if enough and counted:
                items, _ = items_of([example], self._layout, self._data.pairing, self._data.pairing_margin, self._seed)
            filler = Item(w.example, (0, 0) if self._layout in ("pair", "set") else (0,))
            at_rows = [Group(example, replace(item, example=w.example)) for item in items]
            made += at_rows or [Group(example, filler, False)]
        return self._collate(made)

    def _check_scored(self, number: int, found: Sequence[Written]) -> None:
        """Every rank hears of all failures, so that all stop."""
        mine = Counter(problem for w in found for a in w.answers if a.reward is None for problem in a.problems[:1])
        total = sum(gather(sum(len(w.answers) for w in found)))
        failed = sum(gather(sum(a.reward is None for w in found for a in w.answers)))
        if failed <= self.spec.max_unscored * total:
            return
        named = sum(gather(mine), Counter())
        lines = [f"  {n} x {problem}" for problem, n in named.most_common(5)]
        raise UserError(
            f"rollout.rewards: {failed} of {total} samples of round {number} have no reward; rollout.max_unscored = "
            f"{self.spec.max_unscored:g} allows {int(self.spec.max_unscored * total)}. Mend the reward, or raise it.\n"
            + "\n".join(lines)
        )

    def evaluate(self, model: nn.Module, prompts: Sequence[Example]) -> Iterable[Metric]:
        """Rewards of one sample for each prompt, this rank's share of them; not kept."""
        self._draw.update(model)
        mine = list(range(rank(), len(prompts), ranks()))
        found: list[Written] = []
        size = self.spec.sequences_per_call
        for n in range(max(gather(-(-len(mine) // size)))):
            some = mine[n * size : (n + 1) * size]
            found += self._draw([prompts[k] for k in some], [Place(-1, k, k) for k in some], samples=1)
        return group_metrics(found, self.spec)


def _places(number: int, micro: Micro) -> list[Place]:
    return [Place(number, micro.first + i, k) for i, (k, _) in enumerate(micro.picks)]


@torch.no_grad()
def _looked_at(model: nn.Module, batch: Batch, forward: Forward) -> Batch:
    """The batch with what the policy says of it before it is trained on it."""
    training = model.training
    model.eval()
    try:
        return forward(model, batch.to(next(model.parameters()).device)).batch
    finally:
        model.train(training)

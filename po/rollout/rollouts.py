"""Rounds of sampling for the trainer: asks for prompts in, batches of sampled responses out.

Nothing is sampled twice: a group is in the journal before it is trained on, and a run that goes on after a kill reads
what is there. Samples are at most `steps_per_generation * num_iterations - 1` optimizer steps old.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from po.batch import Batch, Collate
from po.data.groups import Group
from po.data.layout import items_of
from po.data.rows import Example, Item
from po.errors import UserError
from po.even import even
from po.forward import Forward
from po.metrics import Metric
from po.ranks import gather, rank, ranks
from po.rollout import before
from po.rollout.draw import Draw, Place
from po.rollout.journal import Journal
from po.rollout.refill import refill, reserve_of
from po.rollout.rounds import Ask, Micro
from po.rollout.stats import group_metrics
from po.rollout.written import Answer, Written, as_example
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
        """least: how many responses a group must have to count. tokenizer: its key, which rows carry."""
        self.spec, self._data, self._draw, self._journal = spec, data, draw, journal
        self._prompts, self._layout, self._collate = prompts, layout, collate
        self._least, self._tokenizer, self._seed = least, tokenizer, seed
        self._round: int | None = None
        self._batches: list[Batch] = []
        self._model: nn.Module | None = None  # whose weights the samplers have yet to be told of
        self._looks = spec.steps_per_generation * spec.num_iterations > 1
        self._before: before.Before | None = None
        self.moved: Callable[[], object] = lambda: None  # called after each call of the sampler

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
        self._model = model
        found = self._written([p for p, counted in counts.items() if counted])
        self._check_scored(ask.round, list(found.values()))
        metrics = list(group_metrics(list(found.values()), self.spec))
        if self.spec.zero_variance == "refill":
            refilled, spent = self._refill(ask.round, found)
            found |= refilled
            metrics.append(("rollout/refilled", torch.tensor([float(spent)]), None))
        if self.spec.zero_variance != "keep":
            found = {p: w for p, w in found.items() if not w.flat}
        sampled = time.perf_counter() - start
        batches = [self._batch([(p, found.get(p)) for p in ps]) for ps in places]
        if self._looks:
            batches = self._looked(model, ask.round, batches, forward)
        if ask.age == 0:  # a run that goes on in the middle of a round has logged them
            record([*metrics, ("perf/sampling_s", torch.tensor([sampled], dtype=torch.float64), None)])
        return batches

    def _looked(self, model: nn.Module, number: int, batches: Sequence[Batch], forward: Forward) -> list[Batch]:
        """With what the policy of the round's start says of them: now, or when the checkpoint was saved."""
        known, self._before = self._before, None
        if known is None or known.round != number:
            return [before.look(model, b, forward) for b in even(batches)]
        device = next(model.parameters()).device
        return [before.recalled(b, said, device) for b, said in zip(batches, known.said, strict=True)]

    def save(self, folder: Path) -> None:
        """What a run that goes on from a checkpoint in the middle of a round must know. Every rank calls it."""
        if self._looks and self._batches:
            assert self._round is not None
            before.save(folder, self._round, self._batches)

    def load(self, folder: Path) -> None:
        """What `save` wrote."""
        self._before = before.load(folder)

    def _written(self, places: Sequence[Place]) -> dict[Place, Written]:
        """The groups of these places, from the journal where it has them. A call of the sampler is made again in full
        where a kill left a part of it: other prompts beside them would round the samples' log-probs otherwise."""
        size = max(1, self._at_once() // self.spec.num_generations)
        calls = [places[i : i + size] for i in range(0, len(places), size)]
        calls = [c for c in calls if not all((p.round, p.place) in self._journal for p in c)]
        most = max(gather(len(calls)))
        if most and self._model is not None:
            self._draw.update(self._model)
            self._model = None
        for call in [*calls, *[()] * (most - len(calls))]:  # ZeRO-3: every rank calls as often
            prompts = [self._prompts[p.example] for p in call]
            made = [w for w in self._drawn(prompts, call) if (w.round, w.place) not in self._journal]
            self._journal.write([w.to_json(self._prompts[w.example], self._tokenizer) for w in made])
        return {p: Written.from_json(self._journal.read((p.round, p.place))) for p in places}

    def _drawn(self, prompts: Sequence[Example], places: Sequence[Place], samples: int | None = None) -> list[Written]:
        made = self._draw(prompts, places, samples)
        self.moved()
        return made

    def _at_once(self) -> int:
        """Sequences between two writes to the journal. A server batches by itself, the more the better."""
        return self.spec.sequences_per_call * (1 if self.spec.server is None else 16)

    def _refill(self, number: int, found: Mapping[Place, Written]) -> tuple[dict[Place, Written], int]:
        """Other prompts' groups for places whose rewards are equal, as far as the budget goes, and how many it took."""
        reserve = reserve_of(number, len(self._prompts), gather([p.example for p in found]), self._seed)
        return refill(
            [p for p, w in found.items() if w.flat],
            reserve,
            int(self.spec.refill_budget * sum(gather(len(found)))),
            self._written,
            lambda w: not w.flat and len(w.sound) >= self._least,
        )

    def _batch(self, groups: Sequence[tuple[Place, Written | None]]) -> Batch:
        """The groups in the heads' layout; where there is nothing to compare, a filler that counts for nothing."""
        made: list[Group] = []
        columns = self._collate.wanted.response_columns
        for place, w in groups:
            at_rows: list[Group] = []
            if w is not None and len(w.sound) >= self._least:
                example = as_example(self._prompts[w.example], w.sound, columns, self.spec.consistency)
                items, _ = items_of([example], self._layout, self._data.pairing, self._data.pairing_margin, self._seed)
                at_rows = [Group(example, replace(item, example=w.example)) for item in items]
            made += at_rows or [self._filler(place.example, columns)]
        return self._collate(made)

    def _filler(self, k: int, columns: Sequence[str]) -> Group:
        """A token after a prompt, so that ranks keep in step; nobody sampled it."""
        prompt = self._prompts[k]
        reward = 0.0 if self.spec.rewards else None
        nothing = Answer(prompt.prompt_ids[-1:], "", "policy", logps=(0.0,), reward=reward)
        item = Item(k, (0, 0) if self._layout in ("pair", "set") else (0,))
        return Group(as_example(prompt, [nothing], columns, self.spec.consistency), item, False)

    def _check_scored(self, number: int, found: Sequence[Written]) -> None:
        """Every rank hears of all failures, so that all stop."""
        mine = Counter(problem for w in found for a in w.answers for problem in a.problems[:1])
        total = sum(gather(sum(len(w.answers) for w in found)))
        failed = sum(gather(sum(bool(a.problems) for w in found for a in w.answers)))
        if failed <= self.spec.max_unscored * total:
            return
        named = sum(gather(mine), Counter())
        lines = [f"  {n} x {problem}" for problem, n in named.most_common(5)]
        raise UserError(
            f"rollout.rewards: {failed} of {total} samples of round {number} have no reward; rollout.max_unscored = "
            f"{self.spec.max_unscored:g} allows {int(self.spec.max_unscored * total)}. Mend the reward, or raise it.\n"
            + "\n".join(lines)
        )

    def once(self, model: nn.Module) -> Iterable[Metric]:
        """Sample and reward every prompt once, without training: this rank's share, as round 0 of the journal."""
        self._model = model
        mine = [Place(0, k, k) for k in range(rank(), len(self._prompts), ranks())]
        found = list(self._written(mine).values())
        self._check_scored(0, found)
        return group_metrics(found, self.spec)

    def evaluate(self, model: nn.Module, prompts: Sequence[Example]) -> Iterable[Metric]:
        """Rewards of one sample for each prompt, this rank's share of them; not kept."""
        return group_metrics(self.samples(model, prompts), self.spec)

    def samples(self, model: nn.Module, prompts: Sequence[Example], n: int = 1) -> list[Written]:
        """n rewarded samples for each prompt, this rank's share of them; the same whenever it is asked of the same
        weights. Not kept."""
        self._draw.update(model)
        mine = list(range(rank(), len(prompts), ranks()))
        found: list[Written] = []
        size = max(1, self._at_once() // n)
        for i in range(max(gather(-(-len(mine) // size)))):
            some = mine[i * size : (i + 1) * size]
            found += self._drawn([prompts[k] for k in some], [Place(-1, k, k) for k in some], n)
        return found


def _places(number: int, micro: Micro) -> list[Place]:
    return [Place(number, micro.first + i, k) for i, (k, _) in enumerate(micro.picks)]

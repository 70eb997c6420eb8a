"""Sampling and rewarding: prompts in, written groups out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from po.data.rows import Example
from po.rewards import Rewards
from po.rollout.sampler import Sampled, Sampler
from po.rollout.written import Answer, Source, Written
from po.spec import RolloutSpec

Decode = Callable[[Sequence[int]], str]


class Place(NamedTuple):
    """Where a group stands: its round, its place in it over all ranks, and the index of its prompt."""

    round: int
    place: int
    example: int

    def seed(self, run: int, what: str) -> int:
        """The same for the same place of the same run, whatever ranks, batches and kills there were."""
        text = repr((run, self.round, self.place, self.example, what))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class Draw:
    """Samples groups and rewards them. `reference` writes what the reference is asked for; None where it is not.
    moving: the reference's sampler goes through the policy's network (adapter off)."""

    def __init__(
        self,
        spec: RolloutSpec,
        sampler: Sampler,
        reference: Sampler | None,
        rewards: Rewards,
        decode: Decode,
        seed: int,
        moving: bool = False,
    ) -> None:
        self._spec, self._rewards, self._decode, self._seed = spec, rewards, decode, seed
        self._samplers: list[tuple[Source, Sampler | None, int]] = [
            ("policy", sampler, spec.num_generations - spec.from_reference),
            ("reference", reference, spec.from_reference),
        ]
        self._follow = [sampler, *([reference] if moving and reference is not None else [])]

    def update(self, model: Any) -> None:
        """The policy's weights are now those of `model`, which is what the trainer holds."""
        for sampler in self._follow:
            sampler.update(model)

    def __call__(
        self, prompts: Sequence[Example], places: Sequence[Place], samples: int | None = None
    ) -> list[Written]:
        """The groups of these prompts. samples: of the policy, in the place of what the recipe says, and nothing else
        (evaluation). Under ZeRO-3 every rank must call it as often, with no prompts where it has none left."""
        groups: list[list[Answer]] = [[] for _ in prompts]
        for source, sampler, n in self._samplers if samples is None else [(*self._samplers[0][:2], samples)]:
            if sampler is not None and n > 0:
                seeds = [p.seed(self._seed, source) for p in places]
                for g, found in enumerate(sampler.sample([self._start(e) for e in prompts], n, seeds)):
                    groups[g] += [self._answer(s, source) for s in found]
        if samples is None and self._spec.own_responses:
            for g, e in enumerate(prompts):
                groups[g] += self._own(e)
        groups = self._score(prompts, groups)
        if samples is None and self._spec.gold == "all_failed":
            groups = self._with_gold(prompts, groups)
        return [Written(*p, tuple(self._label(a) for a in g)) for p, g in zip(places, groups, strict=True)]

    def _start(self, prompt: Example) -> tuple[int, ...]:
        if self._spec.sample_from == "prompt":
            return prompt.prompt_ids
        assert prompt.privileged_ids is not None, "check_needs was not called"
        return prompt.privileged_ids

    def _answer(self, s: Sampled, source: Source) -> Answer:
        return Answer(s.ids, self._decode(s.ids), source, s.ended, s.logps)

    def _own(self, prompt: Example, source: Source = "own") -> list[Answer]:
        labels = prompt.label or (None,) * len(prompt.response_ids)
        return [
            Answer(ids, self._decode(ids), source, label=label)
            for ids, label in zip(prompt.response_ids, labels, strict=True)
        ]

    def _score(self, prompts: Sequence[Example], groups: Sequence[Sequence[Answer]]) -> list[list[Answer]]:
        records = [json.loads(e.record or "{}") for e in prompts]
        owner = [g for g, answers in enumerate(groups) for _ in answers]
        if not owner or not self._spec.rewards:
            return [list(answers) for answers in groups]
        flat = [a for answers in groups for a in answers]
        asked = [records[g]["prompt"] for g in owner]
        columns = {name: [records[g].get(name) for g in owner] for name in _names(records)}
        said = [
            a.text if isinstance(p, str) else [{"role": "assistant", "content": a.text}] for p, a in zip(asked, flat)
        ]
        scored = self._rewards(asked, said, [list(a.ids) for a in flat], columns, owner)
        out: list[list[Answer]] = [[] for _ in groups]
        for g, a, s in zip(owner, flat, scored, strict=True):
            problems = s.problems if s.reward is None else ()  # of rewards without weight: counted, no more
            out[g].append(replace(a, reward=s.reward, parts=s.parts, problems=problems))
        return out

    def _with_gold(self, prompts: Sequence[Example], groups: list[list[Answer]]) -> list[list[Answer]]:
        """The row's own first response in the place of the last sample, where no sample earned anything and it does."""
        failed = [
            g
            for g, answers in enumerate(groups)
            if prompts[g].response_ids and answers and all((a.reward or 0) <= 0 for a in answers)
        ]
        own = [self._own(prompts[g], "gold")[:1] for g in failed]
        for g, (gold,) in zip(failed, self._score([prompts[g] for g in failed], own), strict=True):
            if gold.reward is not None and gold.reward > 0:
                groups[g] = [*groups[g][:-1], gold]
        return groups

    def _label(self, a: Answer) -> Answer:
        """Own responses keep the label that their row gives."""
        above = self._spec.label_above
        if a.label is not None or above is None or a.reward is None:
            return replace(a, label=a.label or 0)
        return replace(a, label=1 if a.reward > above else -1)


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that reward functions are given, as TRL gives them."""
    ours = ("prompt", "completion", "completions", "completion_ids")
    return sorted({name for r in records for name in r if name not in ours})

"""A recipe's `rollout` section as the Rollouts of this run: what samples, what rewards, what keeps the books."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from po.batch import Collate
from po.data.rows import Example
from po.errors import UserError
from po.ranks import rank
from po.ref_kinds import AdapterOff, Reference
from po.rewards import Rewards, build_rewards
from po.rollout.draw import Draw
from po.rollout.hf import HFSampler
from po.rollout.journal import Journal
from po.rollout.rollouts import Rollouts
from po.rollout.sampler import Sampler, Sampling
from po.spec import Recipe, RewardSpec, RolloutSpec
from po.types import Layout, Needs

FOLDER = "rollouts"  # of the run folder


def rewards_of(recipe: Recipe, prompts: Sequence[Example], tokenizer: Any, device: str, models: bool = True) -> Rewards:
    """The recipe's rewards, started; UserError where one cannot work or a row lacks a column that it reads.

    models False: without those that load a model.
    """
    spec = recipe.rollout
    assert spec is not None
    _check_own(spec, prompts, recipe.data.train[0].path)
    chosen = [r for r in spec.rewards if models or (r.model is None and not _reads_rewards(r))]
    rewards = build_rewards(chosen, tokenizer=tokenizer, device=device)
    for name in sorted(rewards.columns):
        lacking = next((e.where for e in prompts if json.loads(e.record or "{}").get(name) is None), None)
        if lacking is not None:
            rewards.close()
            raise UserError(
                f"{recipe.data.train[0].path}: a reward of rollout.rewards reads the column {name!r}; {lacking} has "
                "none. Add it to the rows, or name its column in the source's `columns`"
            )
    return rewards


def _reads_rewards(spec: RewardSpec) -> bool:
    """Whether it builds on other rewards, which may not be there."""
    return spec.verifier in ("anchor_rank", "correct_length", "group_contrast")


def build_rollouts(
    recipe: Recipe,
    rewards: Rewards,
    prompts: Sequence[Example],
    layout: Layout,
    collate: Collate,
    policy: nn.Module,
    reference: Reference | None,
    tokenizer: Any,
    tokenizer_key: str,
    meta: Mapping[str, Any],
    device: torch.device,
    autocast: torch.dtype | None,
) -> Rollouts:
    """meta: what decides this run's samples; a journal made under another one is refused (UserError)."""
    spec = recipe.rollout
    assert spec is not None

    def hf(net: nn.Module, **more: Any) -> HFSampler:
        stops = stop_ids(net, tokenizer)
        pad = tokenizer.pad_token_id
        calls = spec.sequences_per_call
        return HFSampler(net, _sampling(spec), stops, pad, device, sequences_per_call=calls, autocast=autocast, **more)

    sampler: Sampler = hf(policy)
    if spec.server is not None:
        from po.rollout.vllm import VLLMSampler  # imports TRL, which takes seconds

        sampler = VLLMSampler(spec.server, _sampling(spec), stop_ids(policy, tokenizer), device)
    draw = Draw(
        spec,
        sampler,
        _of_reference(spec, policy, reference, hf),
        rewards,
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        recipe.seed,
        moving=isinstance(reference, AdapterOff),
    )
    return Rollouts(
        spec,
        recipe.data,
        draw,
        Journal(Path(recipe.output_dir) / FOLDER, rank(), meta),
        prompts,
        layout,
        collate,
        least=max(_least(t.head.needs) for t in recipe.loss),
        tokenizer=tokenizer_key,
        seed=recipe.seed,
    )


def _sampling(spec: RolloutSpec) -> Sampling:
    return Sampling(spec.max_completion_length, spec.temperature, spec.top_p, spec.top_k)


def _of_reference(
    spec: RolloutSpec, policy: nn.Module, reference: Reference | None, hf: Callable[..., HFSampler]
) -> Sampler | None:
    if not spec.from_reference:
        return None
    assert reference is not None, "the recipe was checked"
    return hf(policy, adapter=False) if reference.net is None else hf(reference.net)


def _least(needs: Needs) -> int:
    """How many responses a head wants in a group."""
    return 2 if needs.layout in ("pair", "set") and not needs.single else 1


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS and those that the model ships with."""
    while not hasattr(model, "generation_config"):
        model = model.module
    shipped = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(shipped if isinstance(shipped, list) else [shipped])} - {None}
    if not found:
        raise UserError("model.tokenizer: has no EOS token, so that samples would never end. Set one in its files")
    return sorted(found)


def _check_own(spec: RolloutSpec, prompts: Sequence[Example], where: str) -> None:
    """The rows bring what the recipe takes of them."""
    for key, asked in (("gold", spec.gold != "never"), ("own_responses", spec.own_responses)):
        lacking = next((e.where for e in prompts if not e.response_ids), None) if asked else None
        if lacking is not None:
            raise UserError(
                f"{where}: rollout.{key} takes the rows' own responses; {lacking} has none. Give rows a `response`"
            )

"""What a trainer reads its rows from: micro-batches in `po.order`, or, of a run that samples, asks for them."""

from __future__ import annotations

from typing import Any

from po.batch import Collate, Groups
from po.order import StepLoader, StepSampler
from po.rollout.rounds import Asks, RoundSampler, alone
from po.spec import RolloutSpec


def train_loader(
    args: Any, groups: Groups, collate: Collate, per_device: int, rollout: RolloutSpec | None
) -> StepLoader:
    """args: the TrainingArguments. rollout: what samples from the groups' prompts, if anything."""
    shuffle = args.train_sampling_strategy != "sequential"
    order = _order(args, groups, per_device, args.gradient_accumulation_steps, shuffle)
    if rollout is None:
        return _loader(args, groups, collate, StepSampler(*order))
    rounds = RoundSampler(*order)
    rounds.steps, rounds.iterations = rollout.steps_per_generation, rollout.num_iterations
    return StepLoader(Asks(), batch_sampler=rounds, collate_fn=alone)


def eval_loader(args: Any, groups: Groups, collate: Collate) -> StepLoader:
    """The rows as they stand."""
    order = _order(args, groups, args.per_device_eval_batch_size, accumulation=1, shuffle=False)
    return _loader(args, groups, collate, StepSampler(*order))


def _order(args: Any, groups: Groups, per_device: int, accumulation: int, shuffle: bool) -> tuple[Any, ...]:
    seed = args.data_seed if args.data_seed is not None else args.seed
    sizes = groups.sizes() if shuffle else ()
    return len(groups), per_device, accumulation, args.world_size, args.process_index, shuffle, seed, sizes


def _loader(args: Any, groups: Groups, collate: Collate, sampler: StepSampler) -> StepLoader:
    return StepLoader(
        groups,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )

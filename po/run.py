"""Builds everything that a recipe says, in the order that lets wrong recipes and rows fail before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from po.batch import Collate, wanted
from po.callbacks import GracefulStop, NonFinite, Watchdog
from po.folder import RunLock, environment
from po.gates import attach
from po.hardening import keep_shm_clean, refuse_pickles
from po.load import Data, load_data
from po.logs import MetricsFile, Progress
from po.merge import check_tensors, each_tensor
from po.policy import load_policy, load_tokenizer, tokenizer_key
from po.process import arguments, keep_freed_memory, quiet, say
from po.recipe import keep_checkpoints, resolved_text
from po.ref_kinds import Reference
from po.reference import build_reference
from po.resume import run_to_end
from po.rollout.assemble import build_rollouts, rewards_of
from po.sharing import problem, share
from po.spec import Recipe, RolloutSpec
from po.trackers import SafeTrackers
from po.trainer import POTrainer
from po.zero import stage

# The fields of `train` that decide which weights a run ends with; a resumed run must have the same.
_SCHEDULE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
)


@dataclass(frozen=True)
class Job:
    """A run that is ready to train."""

    recipe: Recipe
    data: Data
    trainer: POTrainer
    folder: Path
    lock: RunLock
    stop: GracefulStop


def build(recipe: Recipe, notes: Sequence[str] = ()) -> Job:
    """Everything up to the first step. Raises POError for what a user can mend."""
    folder = Path(recipe.output_dir)
    lock = _begin(folder, recipe.resume, notes)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    say("\n".join(data.lines))
    args = arguments(recipe)
    if args.device.type == "cpu":
        keep_freed_memory()
    if args.process_index == 0:
        _write_run_files(folder, recipe, data)
    rewards = None
    if recipe.rollout is not None:
        rewards = rewards_of(recipe, data.train.examples, tokenizer, str(args.device))
    torch.manual_seed(recipe.seed)
    policy, sharing = _policy(recipe, args)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    reference = build_reference(
        recipe,
        [g for g in (data.train, data.eval) if g is not None],
        share_prefix=sharing,
        device=args.device,
        rank=args.process_index,
        world=args.world_size,
        autocast=autocast,
    )
    trackers, args.report_to = SafeTrackers(args.report_to, folder), []
    attach(policy, recipe.loss, reference.net if reference is not None else None)
    guard = NonFinite(folder)
    collate = _collate(recipe, data, sharing, reference)
    meta, rollouts = _meta(recipe, data, args), None
    if rewards is not None:
        made = (policy, reference, tokenizer, tokenizer_key(tokenizer), meta, args.device, autocast)
        rollouts = build_rollouts(recipe, rewards, data.train.examples, data.layout, collate, *made)
    trainer = POTrainer(
        model=policy,
        args=args,
        processing_class=tokenizer,
        train_dataset=data.train,
        eval_dataset=data.eval,
        terms=recipe.loss,
        collate=collate,
        reference=reference,
        guard=guard,
        keep=keep_checkpoints(recipe),
        meta=meta,
        rollouts=rollouts,
    )
    return Job(recipe, data, trainer, folder, lock, _watch(trainer, folder, guard, trackers))


def _begin(folder: Path, resume: bool, notes: Sequence[str]) -> RunLock:
    """A process that behaves, the folder to itself, and what there is to say beforehand."""
    quiet()
    lock = RunLock(folder, resume)
    for note in notes:
        say(f"note: {note}")
    refuse_pickles()
    keep_shm_clean()
    return lock


def _collate(recipe: Recipe, data: Data, sharing: bool, reference: Reference | None) -> Collate:
    """How groups become batches."""
    rollout = recipe.rollout
    return Collate(
        sharing,
        reference.lookup if reference else None,
        data.layout == "pair",
        wanted(recipe.loss),
        recipe.max_tokens_per_forward,
        sampled=rollout is not None,
        temperature=1.0 if rollout is None else rollout.temperature,
        from_privileged=rollout is not None and rollout.sample_from == "privileged",
    )


def _watch(trainer: POTrainer, folder: Path, guard: NonFinite, trackers: SafeTrackers) -> GracefulStop:
    """Our callbacks in the place of transformers' printers."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    stop = GracefulStop()
    for callback in (guard, stop, Watchdog(), MetricsFile(folder), trackers):
        trainer.add_callback(callback)
    trainer.add_callback(Progress(bars=not trainer.args.disable_tqdm))
    return stop


def _policy(recipe: Recipe, args: Any) -> tuple[Any, bool]:
    """The network to train, and whether it shares prompts."""
    policy: Any = load_policy(recipe.model, recipe.lora, activation_checkpointing=args.gradient_checkpointing)
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    reason = problem(base, recipe.data.max_length)
    wanted = recipe.model.share_prefix
    if wanted == "auto" and reason:
        say(f"{type(base).__name__} does not share prompts between responses: {reason}")
    sharing = wanted is True or (wanted == "auto" and reason is None)
    if sharing:
        share(base)
    return policy, sharing


def _meta(recipe: Recipe, data: Data, args: Any) -> dict[str, Any]:
    """What a resumed run must have in common with the one that saved, so that it ends at the same weights."""
    return {
        "world_size": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "rows": data.prepared[0].key,
        "groups": len(data.train),
        "seed": recipe.seed,
        "loss": [repr(t) for t in recipe.loss],
        "lora": repr(recipe.lora),
        "zero_stage": stage(recipe.deepspeed),
        "schedule": {k: str(recipe.train.get(k)) for k in _SCHEDULE},
        **({} if recipe.rollout is None else {"rollout": _what_decides(recipe.rollout)}),
    }


def _what_decides(rollout: RolloutSpec) -> str:
    """A rollout section without what may change between two halves of a run: where a server is, how long is waited for
    rewards, how many may fail."""
    rewards = tuple(replace(r, timeout=1.0) for r in rollout.rewards)
    return repr(replace(rollout, rewards=rewards, server=rollout.server and "server", max_unscored=0.0))


def _write_run_files(folder: Path, recipe: Recipe, data: Data) -> None:
    (folder / "recipe.resolved.yaml").write_text(resolved_text(recipe), "utf-8")
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", "utf-8")
    (folder / "data_report.json").write_text(json.dumps(data.to_json(), indent=2) + "\n", "utf-8")


def train(recipe: Recipe, notes: Sequence[str] = ()) -> None:
    """`po train`: build, train (or resume), save."""
    job = build(recipe, notes)
    run_to_end(job.trainer, job.stop, job.folder, recipe.resume)
    save(job)


def save(job: Job) -> None:
    """The trained adapter or model at the top of the run folder, in safetensors. What was written is read again:
    NumericsError for a tensor with NaN or Inf, UserError for an empty one."""
    job.trainer.save_model(str(job.folder))
    job.trainer.save_state()
    if job.trainer.args.process_index == 0:
        count = check_tensors(each_tensor(job.folder), str(job.folder))
        form = "--merged" if job.recipe.lora is None and job.recipe.model.adapter is None else "--adapter"
        say(f"saved {count} tensors to {job.folder}; for use elsewhere: po export {job.folder} {form}")


def check(recipe: Recipe) -> str:
    """`po check`: rows read and tokenized, needs compared, nothing loaded but the tokenizer."""
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    if recipe.rollout is not None:
        rewards_of(recipe, data.train.examples, tokenizer, "cpu", models=False).close()
    args = recipe.train
    batch = int(args.get("per_device_train_batch_size", 8)) * int(args.get("gradient_accumulation_steps", 1))
    steps = -(-len(data.train) // batch) * (1 if recipe.rollout is None else recipe.rollout.num_iterations)
    return "\n".join(
        [*data.lines, f"{len(data.train)} groups to train on; one rank makes {steps} steps of {batch} per epoch"]
    )

"""`po reward train` and `po reward check`: a recipe to a folder that scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from po.callbacks import GracefulStop, Watchdog
from po.data.groups import Groups
from po.folder import RunLock, environment
from po.hardening import keep_shm_clean, refuse_pickles
from po.logs import MetricsFile, Progress
from po.policy import load_tokenizer
from po.process import arguments, quiet, say
from po.recipe import keep_checkpoints
from po.resume import run_to_end
from po.reward_model import report
from po.reward_model.data import facts, load_pairs, strengths
from po.reward_model.evaluate import evaluate
from po.reward_model.model import Scorer, load, rating_ids, write
from po.reward_model.recipe import resolved_text
from po.reward_model.spec import RewardRecipe
from po.reward_model.trainer import RewardTrainer
from po.trackers import SafeTrackers
from po.zero import stage

_SCHEDULE = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim")


@dataclass(frozen=True)
class Made:
    """A trainer, and what stops it on request."""

    trainer: RewardTrainer
    stop: GracefulStop


def train(recipe: RewardRecipe, notes: Sequence[str] = ()) -> None:
    """Train (or resume), evaluate, and write a whole model with its report."""
    folder = Path(recipe.output_dir)
    quiet()
    lock = RunLock(folder, recipe.resume)
    for note in notes:
        say(f"note: {note}")
    refuse_pickles()
    keep_shm_clean()
    tokenizer = load_tokenizer(recipe.model)
    pairs = load_pairs(recipe, tokenizer)
    say("\n".join(pairs.lines))
    args = arguments(recipe.plain)
    if args.process_index == 0:
        (folder / "recipe.resolved.yaml").write_text(resolved_text(recipe), "utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", "utf-8")
        (folder / "data_report.json").write_text(json.dumps(pairs.to_json(), indent=2) + "\n", "utf-8")
    made = make(recipe, args, tokenizer, pairs.train, pairs.eval, pairs.prepared[0].key, folder)
    run_to_end(made.trainer, made.stop, folder, recipe.resume)
    judged = None if pairs.eval is None else made.trainer.judge(pairs.eval)
    _save(recipe, made.trainer, folder, tokenizer)
    if args.process_index == 0:
        found = None if pairs.eval is None or judged is None else evaluate(judged, strengths(pairs.eval))
        rows = {"train": len(pairs.train)} | ({} if pairs.eval is None else {"eval": len(pairs.eval)})
        say("\n".join(report.write(folder, recipe, rows, found)))
        say(f"saved a reward model to {folder}; to score with it: {json.dumps(report.use(recipe, folder))}")
    lock.release()


def check(recipe: RewardRecipe) -> str:
    """Rows read and tokenized, nothing loaded but the tokenizer."""
    quiet()
    tokenizer = load_tokenizer(recipe.model)
    pairs = load_pairs(recipe, tokenizer)
    rating_ids(recipe, tokenizer)
    batch = int(recipe.train["per_device_train_batch_size"]) * int(recipe.train["gradient_accumulation_steps"])
    steps = -(-len(pairs.train) // batch)
    return "\n".join([*pairs.lines, f"{len(pairs.train)} pairs; one rank makes {steps} steps of {batch} per epoch"])


def make(
    recipe: RewardRecipe, args: Any, tokenizer: Any, rows: Groups, eval_rows: Groups | None, key: str, folder: Path
) -> Made:
    """A trainer for these rows, with the network newly loaded."""
    torch.manual_seed(recipe.seed)
    scorer = Scorer(recipe.objective, tokenizer, rating_ids(recipe, tokenizer))
    trackers, args.report_to = SafeTrackers(args.report_to, folder), []
    meta = {
        "world_size": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "rows": key,
        "pairs": len(rows),
        "zero_stage": stage(recipe.deepspeed),
        "schedule": {k: str(recipe.train.get(k)) for k in _SCHEDULE},
        **facts(recipe),
    }
    trainer = RewardTrainer(
        model=load(recipe, tokenizer, checkpointing=args.gradient_checkpointing),
        args=args,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=eval_rows,
        objective=recipe.objective,
        scorer=scorer,
        keep=keep_checkpoints(recipe.plain),
        meta=meta,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    stop = GracefulStop()
    for callback in (stop, Watchdog(), MetricsFile(folder), trackers, Progress(bars=not args.disable_tqdm)):
        trainer.add_callback(callback)
    return Made(trainer, stop)


def _save(recipe: RewardRecipe, trainer: RewardTrainer, folder: Path, tokenizer: Any) -> None:
    """A whole model at the top of the folder: merged where there is an adapter, gathered where ZeRO-3 cut it up."""
    net: Any = trainer.accelerator.unwrap_model(trainer.model)
    if stage(recipe.deepspeed) == 3:
        trainer.save_model(str(folder))
    elif trainer.args.process_index == 0:
        write(net, folder, tokenizer)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()

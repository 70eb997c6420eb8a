"""transformers.Trainer with a handful of overrides: which rows, no casting, what to count, the loss, what to log.

Everything that decides the objective is here or below in one hop: rows per step (`loaders`, `order`), counts per step
over all micro-batches and ranks (`get_batch_samples`), log-probs (`logprob`), heads and averaging (`objective`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from po.accumulate import accumulate
from po.batch import Batch, Collate, Groups
from po.behaviour import sampling_metrics
from po.callbacks import NonFinite
from po.checkpoint import sealed_save
from po.coupled import Coupled
from po.errors import OutOfMemoryError, out_of_memory
from po.first import check_first
from po.forward import Forward, evaluating
from po.gates import apart, gates_of, load_gates, save_gates
from po.loaders import eval_loader, train_loader
from po.metrics import Meter, Metric, names, preference_metrics
from po.objective import Parts, Scope, counted, objective, scope
from po.reference import Reference, compute_dtype
from po.rollout.rollouts import Rollouts
from po.spec import Term
from po.speed import Speed, positions
from po.types import HeadInput
from po.whole import moved


class POTrainer(Trainer):
    """The training loop. Batch sizes count groups (prompts with their responses).

    reference: gives log ref(y_t) of a batch; None where no head needs one. guard: stops a step that is not finite.
    keep: how many checkpoints stay; meta: what a resumed run must have in common with this one. rollouts: samples the
    responses of the training rows, which then are prompts.
    """

    loss_is_scaled_for_ga = True  # the counts cover the whole optimizer step

    def __init__(
        self,
        *args: Any,
        terms: Sequence[Term],
        collate: Collate,
        reference: Reference | None,
        guard: NonFinite,
        keep: int | None = None,
        meta: Mapping[str, Any] | None = None,
        rollouts: Rollouts | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, data_collator=collate, **kwargs)
        self.terms = tuple(terms)
        self.reference, self.guard = reference, guard
        self.keep, self.meta, self.rollouts = keep, meta or {}, rollouts
        self.meter = Meter()
        self.speed = Speed(self.model, self.args.device, _autocast(self.args) or compute_dtype(self.model))
        self._checked = False
        self.forward = Forward(self.terms, reference, None if rollouts is None else rollouts.spec)
        if rollouts is not None:  # the watchdog sees that sampling moves
            rollouts.moved = lambda: self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self.coupled = None
        splits = collate.max_tokens is not None
        if splits or any(t.head.needs.couples_batch for t in terms):
            rows = len(self.train_dataset.examples)
            self.coupled = Coupled(self.terms, rows, self.args.device, self.forward, self._record, splits)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; from a checkpoint on, the heads' own modules and what they remember included."""
        if resume_from_checkpoint is not None:
            load_gates(self.model, Path(resume_from_checkpoint))
            if self.coupled is not None:
                self.coupled.load(Path(resume_from_checkpoint))
            if self.rollouts is not None:
                self.rollouts.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer, with the heads' own modules in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if (gates := gates_of(self.model)) is not None:
            apart(optimizer, gates.parameters())
        return optimizer

    # Rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        spec = None if self.rollouts is None else self.rollouts.spec
        return train_loader(self.args, self.train_dataset, self.data_collator, self._train_batch_size, spec)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return eval_loader(self.args, eval_dataset or self.eval_dataset, self.data_collator)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    # One optimizer step

    def _scopes(self) -> list[Scope]:
        return sorted({scope(t.head.needs) for t in self.terms})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[Scope, float]]:
        """The micro-batches of one optimizer step, and how many units they hold over all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.forward.progress = self.state.global_step / max(self.state.max_steps, 1)
        if self.rollouts is not None:
            asks: list[Any] = batches
            with self.speed.paused():
                batches = self.rollouts.batches(self.model_wrapped, asks, self.forward, self._record)
        empty = torch.empty(0)
        local = [[int(counted(b.head_input(empty, None), s).sum()) for s in self._scopes()] for b in batches]
        total = torch.tensor(local, dtype=torch.float64, device=device).sum(0)
        counts = dict(zip(self._scopes(), self.accelerator.reduce(total, "sum").tolist(), strict=True))
        self.speed.count([b.stream for b in batches])
        if self.coupled is not None:
            batches = self.coupled.begin(batches)
        return batches, counts

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch. OutOfMemoryError names the batch that did not fit."""
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except (MemoryError, RuntimeError) as e:
            if not out_of_memory(e):
                raise
            raise OutOfMemoryError(
                f"out of memory at step {self.state.global_step + 1}, in a micro-batch of {len(inputs.ids)} groups and "
                f"{positions(inputs.stream)} tokens, the longest response {int(inputs.seg.length_GK.max())}: {e}"
            ) from e
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Mapping[Scope, float] | None = None,
    ) -> Tensor:
        """This micro-batch's share of the step's loss, times the ranks (DDP and DeepSpeed divide gradients by them)."""
        assert num_items_in_batch is not None
        if not self._checked:
            self._check_first(model, inputs)
        if self.coupled is None:
            x, parts = self._apart(model, inputs, num_items_in_batch)
            loss: Tensor = parts.loss * self.args.world_size
            self.guard.watch(inputs.ids, x, loss)
            return loss
        work = self.coupled.work(model, inputs, num_items_in_batch)
        self.guard.watch(inputs.ids, work.x, work.value)
        for part in work.parts[:-1]:
            accumulate(self.accelerator, model, part)
        return work.parts[-1]()

    def _check_first(self, model: nn.Module, batch: Batch) -> None:
        self._checked = True
        dtype = _autocast(self.args) or compute_dtype(model)
        starts = self.reference is not None and self.reference.starts_at_policy and self.state.global_step == 0
        gap = check_first(model, batch, self.forward, dtype, starts)
        if gap is not None:
            self._record([("init/ref_gap", torch.tensor([gap]), None)])

    def _apart(self, model: nn.Module, batch: Batch, counts: Mapping[Scope, float]) -> tuple[HeadInput, Parts]:
        """A micro-batch by itself."""
        seen = self.forward(model, batch)
        parts = objective(self.terms, seen.x, counts)
        self._record(preference_metrics(moved(seen.x, seen.x.policy_T.device), self.terms, parts, seen.scores))
        self._record(sampling_metrics(seen.batch))
        return seen.x, parts

    @torch.no_grad()
    def _record(self, metrics: Iterable[Metric]) -> None:
        for name, values, mask in metrics:
            self.meter.add(name, values.to(self.args.device), None if mask is None else mask.to(self.args.device))

    # Evaluation and logging

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective and all metrics over the evaluation rows, exact over batches and ranks; of a run that samples,
        the rewards of one sample for each evaluation prompt."""
        model, rows = self.model_wrapped, eval_dataset or self.eval_dataset
        kept, self.meter = self.meter, Meter()
        try:
            with self.speed.paused(), evaluating(model):
                if self.rollouts is None:
                    self._go_through(model, rows)
                else:
                    self._record(self.rollouts.evaluate(model, rows.examples))
                found = self.meter.flush()
        finally:
            self.meter = kept
        if self.rollouts is None:
            found["loss"] = sum(t.weight * found[f"loss/{name}"] for t, name in zip(self.terms, names(self.terms)))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _go_through(self, model: nn.Module, rows: Groups) -> None:
        counts = dict.fromkeys(self._scopes(), 1.0)
        seen = []
        for batch in self.get_eval_dataloader(rows):
            if self.coupled is None:
                self._apart(model, self._prepare_inputs(batch), counts)
            else:
                (evened,) = self.coupled.even([batch])
                seen.append(self.forward(model, self._prepare_inputs(evened)))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.coupled is not None:
            self.coupled.evaluate(seen, counts, len(rows.examples))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line to a training line."""
        if "loss" in logs:
            self.speed.put(self.meter)
            found = self.meter.flush()
            self.state.num_input_tokens_seen += self.speed.rates(found)
            logs |= found | {"num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> float:
        """What Trainer adds up as total_flos."""
        return self.speed.cost(inputs.stream)

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that is whole or known not to be; older ones go only after it is sealed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        save = super()._save_checkpoint

        def write() -> None:
            save(model, trial)
            save_gates(model, folder, write=self.args.process_index == 0)
            if self.coupled is not None:
                self.coupled.save(folder)
            if self.rollouts is not None:
                self.rollouts.save(folder)

        with self.speed.paused():
            sealed_save(folder, write, self.meta, self.keep, self.state.best_model_checkpoint)


def _autocast(args: Any) -> torch.dtype | None:
    """The dtype of the Trainer's mixed precision, None where it is off."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

"""transformers.Trainer for reward models: po's order of rows, the loss, exact averages, exact evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from po.checkpoint import sealed_save
from po.data.groups import Groups
from po.data.rows import Item
from po.errors import NumericsError, OutOfMemoryError, out_of_memory
from po.forward import evaluating
from po.loaders import eval_loader, train_loader
from po.metrics import Meter
from po.ranks import gather
from po.reward_model import losses
from po.reward_model.data import Batch, Collate
from po.reward_model.evaluate import Judged, summary
from po.reward_model.model import Scored, Scorer
from po.reward_model.spec import BradleyTerry, Objective


class Taken(NamedTuple):
    """A micro-batch's losses and what they were computed from."""

    loss_N: Tensor
    scored: Scored
    preferred_N: Tensor  # P(the chosen answer is better), as the model sees it


class RewardTrainer(Trainer):
    """The training loop. Batch sizes count pairs; a step's loss is the mean over its pairs, however they are cut into
    micro-batches and ranks (but the contrastive term, whose negatives are those of the micro-batch).

    keep: how many checkpoints stay; meta: what a resumed run must have in common with this one.
    """

    loss_is_scaled_for_ga = True  # the count covers the whole optimizer step

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        scorer: Scorer,
        keep: int | None = None,
        meta: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, data_collator=Collate(objective), **kwargs)
        self.objective, self.scorer, self.keep, self.meta = objective, scorer, keep, meta or {}
        self.meter = Meter()

    # Rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        return train_loader(self.args, self.train_dataset, self.data_collator, self._train_batch_size, None)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return eval_loader(self.args, eval_dataset or self.eval_dataset, self.data_collator)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    # One optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step, and how many pairs they hold over all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        mine = torch.tensor(sum(int(b.counts_N.sum()) for b in batches), dtype=torch.float64, device=device)
        return batches, self.accelerator.reduce(mine, "sum")

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch. OutOfMemoryError names the batch that did not fit."""
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except (MemoryError, RuntimeError) as e:
            if not out_of_memory(e):
                raise
            raise OutOfMemoryError(
                f"out of memory at step {self.state.global_step + 1}, in a micro-batch of {len(inputs.ids)} pairs, the "
                f"longest sequence {max(map(len, inputs.sequences))} tokens: {e}"
            ) from e
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's mean, times the ranks (DDP and DeepSpeed divide gradients by them).

        NumericsError where it is not finite, before the weights change.
        """
        taken = self._take(model, inputs, training=True)
        share_N = inputs.counts_N * (self.args.world_size / num_items_in_batch)
        loss: Tensor = (taken.loss_N * share_N.to(taken.loss_N.dtype)).sum()
        if not bool(loss.detach().isfinite()):
            raise NumericsError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} in rows {', '.join(inputs.ids)}. Look "
                "at these rows; then try a lower learning rate, and resume from the last checkpoint"
            )
        self._record(taken, inputs.counts_N)
        return loss

    def _take(self, model: nn.Module, batch: Batch, training: bool) -> Taken:
        objective = self.objective
        weight = objective.contrastive if isinstance(objective, BradleyTerry) and training else 0.0
        scored = self.scorer(model, batch, features=weight > 0)
        taken = judge(objective, batch, scored)
        if not weight:
            return taken
        again = self.scorer(model, batch, features=True)
        return taken._replace(loss_N=taken.loss_N + weight * _contrast(objective, scored, again))

    @torch.no_grad()
    def _record(self, taken: Taken, counts_N: Tensor) -> None:
        chosen_N, rejected_N = taken.scored.score_2N.detach().chunk(2)
        margin_N = chosen_N - rejected_N
        won_N = (margin_N > 0).float() + 0.5 * (margin_N == 0).float()
        for name, values in (("chosen", chosen_N), ("rejected", rejected_N), ("margins", margin_N)):
            self.meter.add(f"rewards/{name}", values, counts_N)
        self.meter.add("rewards/accuracies", won_N, counts_N)

    # Evaluation and logging

    @torch.no_grad()
    def judge(self, groups: Groups) -> list[Judged]:
        """What the model says of every pair, in the order of the groups, on all ranks."""
        mine: dict[Item, Judged] = {}
        with evaluating(self.model_wrapped):
            for batch in self.get_eval_dataloader(groups):
                taken = self._take(self.model_wrapped, self._prepare_inputs(batch), training=False)
                chosen_N, rejected_N = taken.scored.score_2N.chunk(2)
                columns = (chosen_N, rejected_N, taken.preferred_N, taken.loss_N)
                for item, *numbers in zip(batch.items, *(c.tolist() for c in columns), strict=True):
                    mine[item] = Judged(*numbers)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        found = {item: judged for rank in gather(mine) for item, judged in rank.items()}
        return [found[item] for item in groups.items]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over all evaluation pairs, exact over batches and ranks."""
        found = summary(self.judge(eval_dataset or self.eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line to a training line."""
        if "loss" in logs:
            logs |= self.meter.flush()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> float:
        """Not counted."""
        return 0.0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that is whole or known not to be; older ones go only after it is sealed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        save = super()._save_checkpoint
        sealed_save(folder, lambda: save(model, trial), self.meta, self.keep, self.state.best_model_checkpoint)


def judge(objective: Objective, batch: Batch, scored: Scored) -> Taken:
    """The objective of a batch, the contrastive term apart."""
    chosen_N, rejected_N = scored.score_2N.chunk(2)
    if isinstance(objective, BradleyTerry):
        smooth, center = objective.label_smoothing, objective.center
        loss_N = losses.bradley_terry(chosen_N, rejected_N, batch.margin_N, batch.preference_N, smooth, center)
        return Taken(loss_N, scored, torch.sigmoid((chosen_N - rejected_N).detach()))
    assert scored.logp_2NS is not None
    better_NS, worse_NS = scored.logp_2NS.chunk(2)
    allowed_NSS = None
    if batch.quality_2N is not None:
        c_N, r_N = batch.quality_2N.chunk(2)
        triangle = objective.quality == "triangle"
        allowed_NSS = losses.region(c_N, r_N, objective.levels, len(objective.ratings), triangle)
    with torch.no_grad():
        preferred_N = losses.wins(better_NS, worse_NS)
    return Taken(losses.ordinal(better_NS, worse_NS, allowed_NSS), scored, preferred_N)


def _contrast(objective: Objective, first: Scored, second: Scored) -> Tensor:
    """The contrastive term of each pair, (N,)."""
    assert isinstance(objective, BradleyTerry)
    assert first.feature_2ND is not None
    assert second.feature_2ND is not None
    halves = [x.chunk(2) for x in (first.feature_2ND, second.feature_2ND)]
    if objective.features == "difference":
        one_ND, two_ND = (chosen_ND - rejected_ND for chosen_ND, rejected_ND in halves)
        return losses.contrastive(one_ND, two_ND, objective.temperature)
    each_2N = losses.contrastive(first.feature_2ND, second.feature_2ND, objective.temperature)
    return torch.stack(each_2N.chunk(2)).mean(0)

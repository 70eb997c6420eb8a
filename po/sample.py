"""`po sample`: write and reward responses to a recipe's prompts once, without training on them.

The rows are what `data.train` reads. Iterations (self-rewarding, SELM, best against worst) are `po sample` and
`po train` in turn: docs/rollouts.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from po.errors import UserError
from po.metrics import Meter
from po.process import say
from po.ranks import rank
from po.run import build
from po.spec import Recipe
from po.zero import stage


def sample(recipe: Recipe, notes: Sequence[str] = ()) -> None:
    """Every prompt's samples with their rewards, in output_dir/rollouts/rank*.jsonl. With resume=true the same command
    goes on where a kill ended it.

    Raises UserError for a recipe without a `rollout` section, for one under ZeRO-3 (which has nothing to sample from
    before a Trainer trains), and where rewards fail on more samples than the recipe allows.
    """
    if recipe.rollout is None:
        raise UserError("po sample: the recipe has no `rollout` section, which says how to sample and what to reward")
    if stage(recipe.deepspeed) == 3:
        raise UserError("po sample: under ZeRO-3 there is no whole model to sample from; write `deepspeed: null`")
    job = build(recipe, notes)
    rollouts = job.trainer.rollouts
    assert rollouts is not None
    job.trainer.model.to(job.trainer.args.device)
    meter = Meter()
    for name, values, mask in rollouts.once(job.trainer.model):
        meter.add(name, values, mask)
    figures = meter.flush()
    if rank() == 0:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        say(f"{len(job.data.train)} prompts sampled: {shown}\nrows: {job.folder}/rollouts/rank*.jsonl")

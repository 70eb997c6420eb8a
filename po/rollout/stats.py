"""What a log line says of sampled groups, under TRL's names where TRL has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import pstdev

import torch

from po.metrics import Metric
from po.rollout.written import Written
from po.spec import RolloutSpec


def group_metrics(groups: Sequence[Written], spec: RolloutSpec) -> Iterator[Metric]:
    """reward: mean over samples, before advantages. reward_std: of a group, population. frac_reward_zero_std: groups
    whose rewards are equal. rewards/NAME/mean: a reward before its weight, where it applies. completions/mean_length:
    tokens; clipped_ratio: cut at max_completion_length. rollout/unscored: samples without a reward. rollout/gold:
    groups that were given their row's own response."""
    answers = [a for w in groups for a in w.answers if a.source in ("policy", "reference")]
    yield _mean("reward", [a.reward for a in answers])
    of_groups = [[a.reward for a in w.sound if a.reward is not None] for w in groups]
    yield _mean("reward_std", [pstdev(rewards) for rewards in of_groups if len(rewards) > 1])
    yield _mean("frac_reward_zero_std", [float(w.flat) for w in groups])
    for name in dict.fromkeys(name for a in answers for name in a.parts):
        yield _mean(f"rewards/{name}/mean", [a.parts.get(name) for a in answers])
    yield _mean("completions/mean_length", [float(len(a.ids)) for a in answers])
    yield _mean("completions/clipped_ratio", [float(not a.ended) for a in answers])
    yield _mean("rollout/unscored", [float(bool(a.problems)) for a in answers])
    if spec.gold != "never":
        yield _mean("rollout/gold", [float(any(a.source == "gold" for a in w.answers)) for w in groups])


def _mean(name: str, values: Sequence[float | None]) -> Metric:
    found = [v for v in values if v is not None]
    return name, torch.tensor(found, dtype=torch.float64), None

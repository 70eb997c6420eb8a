"""Rewards of sampled completions: functions, reward models, verifiers, endpoints. docs/rewards.md has each of them.

In order: `cells` (a number, None or a failure), `verifiers`, `mathematics`, `code`, `endpoint`, `functions` (what
runs in processes of their own), `worker` (such a process), `models` and `ordinal`, `group` and `shaping` (what reads
other rewards), `score` (the weighted sum), `build` (from the recipe). Importing this imports no torch, so a worker
starts in a moment.
"""

from po.rewards.build import build_rewards, reward_name
from po.rewards.score import Rewards, Scored

__all__ = ["Rewards", "Scored", "build_rewards", "reward_name"]

"""Reward models trained on pairs: `po reward train`, `po reward check`, `po reward strength`. docs/reward_models.md."""

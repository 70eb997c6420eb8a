"""Runs that sample: who writes responses (`sampler`, `hf`, `vllm`), when (`rounds`), what is kept (`journal`,
`written`), and what the trainer is given (`draw`, `rollouts`, `assemble`). docs/rollouts.md explains the recipe's part.
"""

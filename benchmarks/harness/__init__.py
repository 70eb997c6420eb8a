"""What the benchmarks on the sandbox share: the world and its facts, one training run, what is measured, intervals."""

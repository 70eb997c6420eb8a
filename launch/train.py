#!/usr/bin/env python
"""Train a recipe under a launcher, from a checkout, whether po is installed or not:

    deepspeed --num_gpus 8 launch/train.py recipes/dpo-ultrafeedback-qwen2.5-7b.yaml
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/train.py recipe.yaml
    torchrun --nproc_per_node 8 launch/train.py recipe.yaml train.learning_rate=1e-6
    python launch/train.py recipe.yaml

The same as `po train`. The launcher's own --local_rank=N may stand anywhere. Exit codes: see `po --help`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's po, before an installed one

from po.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

#!/bin/bash
# Train a recipe on Slurm, on any number of nodes. Edit the lines marked EDIT, then:
#
#   sbatch launch/slurm.sh recipes/dpo-ultrafeedback-qwen2.5-7b.yaml train.learning_rate=1e-6
#
# The job saves and leaves five minutes before its time is over. To go on, submit the same line again:
# `resume=true` takes the newest whole checkpoint, and starts from the beginning where there is none.

#SBATCH --job-name=po
#SBATCH --nodes=2                   # EDIT
#SBATCH --gpus-per-node=8           # EDIT
#SBATCH --cpus-per-task=64          # EDIT: all cores of a node
#SBATCH --ntasks-per-node=1         # one launcher per node; it starts one process per GPU
#SBATCH --time=24:00:00             # EDIT
#SBATCH --signal=USR1@300           # 300 s before the end: all ranks save at the end of their step and leave
#SBATCH --output=%x-%j.log
# #SBATCH --partition=...           # EDIT: what your cluster asks for
# #SBATCH --account=...

set -euo pipefail
recipe=${1:?usage: sbatch launch/slurm.sh recipe.yaml [key=value ...]}
shift

cd "${SLURM_SUBMIT_DIR:-.}"         # submit from the checkout, on a disk that all nodes see
source .venv/bin/activate           # EDIT: your environment

export HF_HOME=${HF_HOME:-$PWD/.cache/huggingface}   # EDIT: shared by all nodes
export PO_CACHE=${PO_CACHE:-$PWD/.cache/po}          # tokenized rows and reference log-probs, shared by all nodes
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TOKENIZERS_PARALLELISM=false
# export HF_HUB_OFFLINE=1 WANDB_MODE=offline         # on nodes without internet
# export NCCL_SOCKET_IFNAME=ib0                      # where NCCL picks the wrong network

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))        # two jobs of a node do not meet
export MASTER_ADDR MASTER_PORT

# `trap "" USR1`: the signal is for the ranks; without this it would end the launcher on the spot.
srun --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    exec torchrun \
        --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        launch/train.py "$@"
' po "$recipe" resume=true "$@"

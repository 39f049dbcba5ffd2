#!/usr/bin/env bash
# A run on several machines under Slurm, in a folder that all of them see. From there:
#
#   sbatch --nodes=2 examples/slurm.sh [NAME=VALUE | @RECIPE | --seed S ...]
#
# A job that is preempted, requeued or submitted again goes on with its newest checkpoint, and ends at once where the
# run is finished. What a partition needs besides (account, partition, time) goes on sbatch's command line.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# One machine alone makes .venv and fetches the data.
./run.sh --dry-run "$@"

export NNODES=$SLURM_NNODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # two jobs may share a machine
# shellcheck disable=SC2016  # each task has a SLURM_NODEID of its own
srun bash -c 'NODE_RANK=$SLURM_NODEID exec ./run.sh "$@"' run.sh \
    --checkpoint-every 250 --resume newest "$@"

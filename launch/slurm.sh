#!/usr/bin/env bash
# Train on a Slurm cluster, one process per task:
#
#   sbatch --ntasks 5 launch/slurm.sh configs/quickstart.yaml [ist train options]
#
# train.workers must be the number of tasks (one less with pool.coordinator=dedicated).
#SBATCH --job-name=ist
#SBATCH --cpus-per-task=1
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
exec srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID \
    LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*} exec ist train "$@"' ist "$@"

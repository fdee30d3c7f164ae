#!/usr/bin/env bash
#SBATCH --job-name=amdp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#
# Pretrains GPT or BERT with Megatron-LM on the nodes of a Slurm job; submit it from the repository.
#
#   MEGATRON_LM_PATH=~/Megatron-LM SCHEDULE=paci MODEL=1.3b MOCK_DATA=1 \
#       sbatch --nodes 4 scripts/slurm_pretrain_megatron.sh gpt [arguments for Megatron-LM]
#
# The variables are those of scripts/pretrain_gpt_megatron.sh, scripts/pretrain_bert_megatron.sh and
# scripts/megatron_job.sh; NODES, GPUS_PER_NODE and the meeting point come from Slurm.

set -euo pipefail

# Slurm runs a copy of this file that lies elsewhere.
root="${SLURM_SUBMIT_DIR:?submit this with sbatch}"
job="$root/scripts/pretrain_${1:-}_megatron.sh"
[[ -f "$job" ]] || {
    echo "[amdp] error: there is no $job; submit from the repository, and name the model first: gpt or bert" >&2
    exit 1
}
shift

nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${nodes%%$'\n'*}"
# Two jobs on one node must not meet each other.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export JOB_ID="$SLURM_JOB_ID" NODES="$SLURM_JOB_NUM_NODES" GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
# srun does not inherit it by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# One task a node, whatever the job was given; if one node's ranks fail, the others do not wait for ever.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$job" "$@"

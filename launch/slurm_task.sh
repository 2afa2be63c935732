#!/usr/bin/env bash
# One task of a Slurm step: tells JAX its place among the others, and runs the command; slurm.sh
# calls it through srun.
#
#   launch/slurm_task.sh COMMAND...
#
# With several tasks on a node each takes one of its GPUs, else one takes all. The exit status also
# goes to slurm-JOB.TASK.status: srun does not tell a mistake from what it killed because of it.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

while is_option "${1:-}"; do option "$1"; shift; done
(( $# )) || die "no command; see --help"
require SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NNODES

settings=("STATUS_FILE=slurm-$SLURM_JOB_ID.$SLURM_PROCID.status" MAX_RESTARTS=0)
if (( SLURM_NTASKS > 1 )); then
  require JAX_COORDINATOR_ADDRESS
  settings+=("JAX_NUM_PROCESSES=$SLURM_NTASKS" "JAX_PROCESS_ID=$SLURM_PROCID")
fi
# Left to itself, JAX takes one GPU for each task under Slurm.
if (( SLURM_NTASKS > SLURM_NNODES )); then
  gpu="$(gpu_at "$SLURM_LOCALID")"
  settings+=("CUDA_VISIBLE_DEVICES=$gpu" JAX_LOCAL_DEVICE_IDS=0)
else
  settings+=("JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $(( ${SLURM_GPUS_ON_NODE:-1} - 1 )))")
fi
line=(env "${settings[@]}" "$ROOT/launch/supervise.sh" "$@")
if is_dry; then print_command "${line[@]}"; else exec "${line[@]}"; fi

#!/usr/bin/env bash
#SBATCH --job-name=meanflow_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Trains on a Slurm cluster, queued again by exit status, after preemption and at the time limit.
#
#   NODES=4 launch/slurm.sh [--dry_run] --config=configs/imagenet_b2.py --workdir=/shared/runs/b2
#   sbatch --nodes=4 launch/slurm.sh --config=configs/imagenet_b2.py --workdir=/shared/runs/b2
#
# The two do the same; run them in the checkout, which all nodes must see. Flags alone are those of
# main.py; anything else is a whole command. 120 seconds before the time limit all tasks get SIGTERM,
# save, and the job goes back to the queue; so it does when a node is lost. A mistake, NaN, Ctrl-C
# and scancel end it.
#
# Settings of the first form, by environment variables (or SBATCH_PARTITION, SBATCH_ACCOUNT,
# SBATCH_TIMELIMIT, ..., which sbatch itself reads):
#   NODES           (1)
#   TASKS_PER_NODE  1: a process drives all GPUs of its node; as many as GPUs: one for each (1)
#   GPUS_PER_NODE   (8)
# and of the job:
#   MAX_RESTARTS    how often it is queued again at most (100)
#   PYTHON          the interpreter, one that all nodes see (python)
set -euo pipefail
# In a job, this file is a copy in Slurm's spool.
here="$(dirname "${BASH_SOURCE[0]}")"
if [[ -n "${SLURM_JOB_ID:-}" ]]; then here="${SLURM_SUBMIT_DIR:-.}/launch"; fi
if [[ ! -f "$here/lib.sh" ]]; then
  printf 'slurm.sh: error: no %s/lib.sh; submit it in the checkout\n' "$here" >&2
  exit 2
fi
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

while is_option "${1:-}"; do option "$1"; shift; done
set_command "$@"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
require_number MAX_RESTARTS
cd "$ROOT"
step=(srun --kill-on-bad-exit=1 launch/slurm_task.sh "${COMMAND[@]}")

submit() {
  NODES="${NODES:-1}" TASKS_PER_NODE="${TASKS_PER_NODE:-1}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
  require_positive NODES TASKS_PER_NODE GPUS_PER_NODE
  if (( TASKS_PER_NODE != 1 && TASKS_PER_NODE != GPUS_PER_NODE )); then
    die "TASKS_PER_NODE must be 1 or GPUS_PER_NODE, $GPUS_PER_NODE, got '$TASKS_PER_NODE'"
  fi
  run sbatch "--nodes=$NODES" "--ntasks-per-node=$TASKS_PER_NODE" \
    "--gpus-per-node=$GPUS_PER_NODE" launch/slurm.sh "$@"
  # What the job will do.
  if is_dry; then run "${step[@]}"; fi
}

# Prints the status of a task that failed by a mistake, if there is one.
mistake() {
  local file own found=""
  for file in "slurm-$SLURM_JOB_ID".*.status; do
    [[ -e "$file" ]] || continue
    own="$(cat "$file")"
    rm -f -- "$file"
    if (( own != 0 )) && ! is_temporary "$own"; then found="$own"; fi
  done
  printf '%s' "$found"
}

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  submit "$@"
  exit
fi

# Below the ports that systems give to clients; other jobs on the node get others.
port=$(( 20000 + SLURM_JOB_ID % 10000 ))
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export JAX_COORDINATOR_ADDRESS="${nodes%%$'\n'*}:$port"
if is_dry; then
  run "${step[@]}"
  exit
fi

# Only scancel, preemption and the time limit itself signal this shell (Slurm signals the tasks on
# its own): then queueing again is Slurm's business.
told=0
trap 'told=1' TERM INT
"${step[@]}" &
step_id=$!
while :; do
  status=0
  wait "$step_id" || status=$?
  kill -0 "$step_id" 2> /dev/null || break
done

own="$(mistake)"
if [[ -n "$own" ]]; then status="$own"; fi
if (( told )) || ! is_temporary "$status"; then exit "$status"; fi
if (( ${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS )); then
  die "exit status $status after $MAX_RESTARTS restarts, giving up"
fi
printf 'slurm.sh: exit status %d, back to the queue\n' "$status" >&2
scontrol requeue "$SLURM_JOB_ID"

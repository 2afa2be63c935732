#!/usr/bin/env bash
# Starts the processes of one node, and ends all of them when one fails; gpu_node.sh calls it.
#
#   launch/processes.sh [--dry_run] COMMAND...
#
# The exit status is that of the first one that failed.
#
# Settings, by environment variables:
#   PROCESSES    how many on this node (1: all GPUs in one process; more: one GPU for each)
#   NODES        how many nodes (1)
#   NODE_RANK    which of them this is, from 0 (0)
#   COORDINATOR  host:port of node 0, the same on all nodes (with one node localhost:12321)
#   STOP_GRACE   seconds from SIGTERM to SIGKILL for the others (120)
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

while is_option "${1:-}"; do option "$1"; shift; done
(( $# )) || die "no command; see --help"
PROCESSES="${PROCESSES:-1}"
NODES="${NODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
STOP_GRACE="${STOP_GRACE:-120}"
require_positive PROCESSES NODES
require_number NODE_RANK STOP_GRACE
(( NODE_RANK < NODES )) || die "NODE_RANK must be 0 to $(( NODES - 1 )), got '$NODE_RANK'"
if (( NODES > 1 )); then
  require COORDINATOR
  [[ "$COORDINATOR" =~ ^.+:[0-9]+$ ]] || die "COORDINATOR must be host:port, got '$COORDINATOR'"
fi
COORDINATOR="${COORDINATOR:-localhost:12321}"

if (( PROCESSES * NODES == 1 )); then
  if is_dry; then print_command "$@"; exit; fi
  exec "$@"
fi

# Sets LINE: the command with the environment of one process.
set_line() {
  local index="$1" gpu
  shift
  LINE=(
    env
    "JAX_COORDINATOR_ADDRESS=$COORDINATOR"
    "JAX_NUM_PROCESSES=$(( NODES * PROCESSES ))"
    "JAX_PROCESS_ID=$(( NODE_RANK * PROCESSES + index ))"
  )
  if (( PROCESSES > 1 )); then
    gpu="$(gpu_at "$index")"
    LINE+=("CUDA_VISIBLE_DEVICES=$gpu" JAX_LOCAL_DEVICE_IDS=0)
  fi
  LINE+=("$@")
}

pids=()
failed=0

signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" "$pid" 2> /dev/null || true; done
}
trap 'signal_all TERM' TERM HUP
trap 'signal_all INT' INT

# Drops the processes that have ended from `pids`; the first failure stays in `failed`.
collect() {
  local pid status running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then
      running+=("$pid")
    else
      status=0
      wait "$pid" || status=$?
      if (( failed == 0 )); then failed=$status; fi
    fi
  done
  pids=(${running[@]+"${running[@]}"})
}

for (( index = 0; index < PROCESSES; index++ )); do
  set_line "$index" "$@"
  if is_dry; then
    print_command "${LINE[@]}"
  else
    # In process groups of their own (-m) they heed SIGINT, and get Ctrl-C once: from here.
    set -m
    "${LINE[@]}" &
    pids+=($!)
    set +m
  fi
done

deadline=""
while (( ${#pids[@]} )); do
  sleep 0.5
  collect
  if (( failed && ${#pids[@]} )); then
    if [[ -z "$deadline" ]]; then
      printf 'processes.sh: a process ended with status %d, stopping the other %d\n' \
        "$failed" "${#pids[@]}" >&2
      deadline=$(( SECONDS + STOP_GRACE ))
      signal_all TERM
    elif (( SECONDS >= deadline )); then
      signal_all KILL
    fi
  fi
done
exit "$failed"

#!/usr/bin/env bash
# Trains on one node with GPUs, or on several that you start by hand; restarts by exit status.
#
#   launch/gpu_node.sh [--dry_run] --config=configs/imagenet_b2.py --workdir=runs/b2
#   launch/gpu_node.sh [--dry_run] COMMAND...
#
# Flags alone are those of main.py.
#
# By default one process drives all GPUs of the node. On several nodes start the same line on each,
# with its own NODE_RANK:
#
#   NODES=2 NODE_RANK=0 COORDINATOR=10.0.0.1:12321 launch/gpu_node.sh ...
#   NODES=2 NODE_RANK=1 COORDINATOR=10.0.0.1:12321 launch/gpu_node.sh ...
#
# Settings, by environment variables:
#   PROCESSES    processes on this node (1: all GPUs in one; 8: one for each of 8 GPUs)
#   NODES        how many nodes (1)
#   NODE_RANK    which of them this is, from 0 (0)
#   COORDINATOR  host:port of node 0, the same on all nodes (with one node localhost:12321)
#   STOP_GRACE   seconds that the others have to stop when one has failed (120)
#   MAX_RESTARTS, RESTART_PAUSE  see supervise.sh (100, 10 seconds)
#   PYTHON       the interpreter (python)
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

while is_option "${1:-}"; do option "$1"; shift; done
set_command "$@"
export DRY_RUN="${DRY_RUN:-0}"
cd "$ROOT"
if is_dry; then exec "$ROOT/launch/processes.sh" "${COMMAND[@]}"; fi
exec "$ROOT/launch/supervise.sh" "$ROOT/launch/processes.sh" "${COMMAND[@]}"

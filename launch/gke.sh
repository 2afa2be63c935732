#!/usr/bin/env bash
# Trains on Google Kubernetes Engine, as a JobSet on a TPU or GPU node pool; needs kubectl, and the
# JobSet controller in the cluster.
#
#   launch/gke.sh [--dry_run] submit --config=configs/imagenet_b2.py --workdir=DIR
#   launch/gke.sh [--dry_run] submit COMMAND...
#   launch/gke.sh [--dry_run] logs      follows what host 0 prints
#   launch/gke.sh [--dry_run] status    the JobSet and its pods
#   launch/gke.sh [--dry_run] delete    ends the run, saved if the pods have the time
#
# Flags alone are those of main.py. A dry run of `submit` prints the YAML on standard output, ready
# for `kubectl create --filename=-`, and the command on standard error.
#
# Settings, by environment variables:
#   NAME            of the JobSet
#   NAMESPACE       (default)
# and for `submit`:
#   IMAGE           the container image, see launch/Dockerfile
#   ACCELERATOR     a slice, as --topology names it (v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:8x8), or the
#                   GPU of a node pool as GKE names it (nvidia-h100-80gb, nvidia-h200-141gb, ...)
#   SLICES          TPU: several slices as one run (1)
#   NODES           GPU: how many nodes (1)
#   GPUS_PER_NODE   GPU: (8)
#   SPOT            1: on spot nodes only (0)
#   SERVICE_ACCOUNT of the pods, one that may read and write the bucket (default)
#   MAX_RESTARTS    (100)
# shellcheck disable=SC2153
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

set_verb "submit, logs, status or delete" "$@"

require NAME
NAMESPACE="${NAMESPACE:-default}"
require_name NAME NAMESPACE
in_namespace=(kubectl "--namespace=$NAMESPACE")
mine="app.kubernetes.io/instance=$NAME,app.kubernetes.io/managed-by=meanflow_jax"

# Sets `accelerator`, `topology`, `hosts` and `chips` (of a host) from ACCELERATOR.
read_slice() {
  local version="${ACCELERATOR%%:*}" side total=1 sides='^[1-9][0-9]*x[1-9][0-9]*$' example=4x4
  topology="${ACCELERATOR#*:}"
  case "$version" in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    *) die "ACCELERATOR '$ACCELERATOR' is none of v4, v5e, v5p, v6e with :TOPOLOGY, nor nvidia-..." ;;
  esac
  if [[ "$version" == v4 || "$version" == v5p ]]; then
    sides='^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$' example=2x2x4
  fi
  [[ "$topology" =~ $sides ]] \
    || die "ACCELERATOR '$ACCELERATOR': the topology of a $version is like $example"
  for side in ${topology//x/ }; do total=$(( total * side )); done
  # Hosts have 4 chips, but those of v5e and v6e that are a slice by themselves also 1 or 8.
  chips=4
  if [[ "$topology" == 1x1 || "$topology" == 2x4 ]]; then chips=$total; fi
  (( total % chips == 0 )) \
    || die "ACCELERATOR '$ACCELERATOR': its $total chips are not whole hosts of $chips"
  hosts=$(( total / chips ))
}

# As in a JSON string, which YAML reads alike.
quote() {
  local text="$1"
  text="${text//\\/\\\\}"
  text="${text//\"/\\\"}"
  printf '%s' "$text"
}

# The command as a YAML list. Kubernetes takes $(NAME) for a variable, and $$ for $.
quote_command() {
  local word separator=""
  printf '['
  for word in "$@"; do
    printf '%s"%s"' "$separator" "$(quote "${word//\$/\$\$}")"
    separator=", "
  done
  printf ']'
}

render() {
  local text="" line template="$ROOT/launch/jobset_gpu.yaml"
  local accelerator="$ACCELERATOR" topology="" hosts="$NODES" chips="$GPUS_PER_NODE"
  if [[ "$ACCELERATOR" != nvidia-* ]]; then
    template="$ROOT/launch/jobset_tpu.yaml"
    read_slice
  fi
  while IFS= read -r line; do
    if [[ "$line" == *"# if SPOT" ]]; then
      (( SPOT )) || continue
      line="${line% \# if SPOT}"
    fi
    text+="$line"$'\n'
  done < "$template"
  local placeholder value
  for placeholder in NAMESPACE NAME SERVICE_ACCOUNT IMAGE MAX_RESTARTS SLICES; do
    value="$(quote "${!placeholder}")"
    text="${text//@$placeholder@/"$value"}"
  done
  value="$(quote "$accelerator")"
  text="${text//@ACCELERATOR@/"$value"}"
  text="${text//@TOPOLOGY@/"$topology"}"
  text="${text//@HOSTS@/"$hosts"}"
  text="${text//@CHIPS@/"$chips"}"
  # Last, as it may hold anything.
  value="$(quote_command "${COMMAND[@]}")"
  printf '%s' "${text//@COMMAND@/"$value"}"
}

submit() {
  local yaml word
  require IMAGE ACCELERATOR
  SLICES="${SLICES:-1}" NODES="${NODES:-1}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}" SPOT="${SPOT:-0}"
  MAX_RESTARTS="${MAX_RESTARTS:-100}" SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}"
  require_positive SLICES NODES GPUS_PER_NODE
  require_number MAX_RESTARTS
  [[ "$SPOT" == [01] ]] || die "SPOT must be 0 or 1, got '$SPOT'"
  if [[ "${1:-}" == -- ]]; then shift; fi
  # TPU hosts find each other by what GKE tells them.
  if [[ "${1:-}" == -* && "$ACCELERATOR" != nvidia-* ]]; then set -- "$@" --distributed; fi
  PYTHON=python
  set_command "$@"
  for word in "${COMMAND[@]}" "$IMAGE" "$ACCELERATOR" "$SERVICE_ACCOUNT"; do
    [[ "$word" != *[[:cntrl:]]* ]] || die "no control characters, please: $(print_command "$word")"
  done
  yaml="$(render)"
  if is_dry; then
    printf '%s\n' "$yaml"
    print_command "${in_namespace[@]}" create --filename=- >&2
  else
    "${in_namespace[@]}" create --filename=- <<< "$yaml"
  fi
}

delete() {
  printf 'gke.sh: deleting the JobSet %s in namespace %s and its pods\n' "$NAME" "$NAMESPACE" >&2
  run "${in_namespace[@]}" delete jobset "--selector=$mine"
}

first="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0"
first+=",batch.kubernetes.io/job-completion-index=0"
case "$VERB" in
  submit) submit "${REST[@]}" ;;
  logs) run "${in_namespace[@]}" logs --follow --tail=100 "--selector=$first" ;;
  status)
    run "${in_namespace[@]}" get jobset "--selector=$mine"
    run "${in_namespace[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  delete) delete ;;
  *) wrong_verb ;;
esac

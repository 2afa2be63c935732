#!/usr/bin/env bash
# Trains on slices of Cloud TPU, which come as queued resources. Runs on your machine; needs gcloud.
#
#   launch/tpu_pod.sh [--dry_run] create           asks for the slice
#   launch/tpu_pod.sh [--dry_run] setup            copies this checkout to all hosts, and installs it
#   launch/tpu_pod.sh [--dry_run] run COMMAND...   starts the command on all hosts
#   launch/tpu_pod.sh [--dry_run] logs             follows what host 0 prints
#   launch/tpu_pod.sh [--dry_run] status           the slice, and the command on each host
#   launch/tpu_pod.sh [--dry_run] stop             SIGTERM: saved everywhere, and ended
#   launch/tpu_pod.sh [--dry_run] delete           deletes the slice, at once
#   launch/tpu_pod.sh [--dry_run] supervise COMMAND...
#
# `supervise` does all of it: create, setup, run; makes a slice anew that was taken away, until the
# command has ended. It leaves the slice to you: stop paying with `delete`.
#
# A COMMAND is a whole one, or the flags of main.py; these get --distributed, with which all hosts
# are one run. Its checkpoints must be seen by all: --config.checkpoint.path=gs://BUCKET/RUN.
#
# Settings, by environment variables:
#   NAME             of the queued resource, and of its slice
#   ZONE             for example us-east5-a
#   ACCELERATOR_TYPE v5litepod-16, v5p-128, v6e-64, ...
#   RUNTIME_VERSION  (the one that goes with v4, v5litepod, v5p, v6e)
#   SPOT             1: cheaper, and taken away at any time (0)
#   SLICES           several slices as one run (1)
#   PROJECT          (gcloud's own setting)
#   COPY             more files and folders of the checkout for the hosts, with spaces between ()
#   PYTHON_VERSION   that the hosts install (3.12)
#   POLL             seconds between two looks of `supervise` (60)
#   MAX_RESTARTS     of the command on a host, and of the slice by `supervise` (100)
# shellcheck disable=SC2153
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

set_verb "create, setup, run, logs, status, stop, delete or supervise" "$@"

require NAME ZONE
require_name NAME
SLICES="${SLICES:-1}" SPOT="${SPOT:-0}" POLL="${POLL:-60}" MAX_RESTARTS="${MAX_RESTARTS:-100}"
PYTHON_VERSION="${PYTHON_VERSION:-3.12}"
require_positive SLICES
require_number POLL MAX_RESTARTS
[[ "$SPOT" == [01] ]] || die "SPOT must be 0 or 1, got '$SPOT'"

place=("--zone=$ZONE")
if [[ -n "${PROJECT:-}" ]]; then place+=("--project=$PROJECT"); fi
resources=(gcloud compute tpus queued-resources)
folder=meanflow_jax
# By this label `delete` knows what `create` made.
label=launcher=meanflow_jax

runtime_version() {
  case "$ACCELERATOR_TYPE" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "no RUNTIME_VERSION is known for ACCELERATOR_TYPE '$ACCELERATOR_TYPE'; set it" ;;
  esac
}

create() {
  local version options=()
  require ACCELERATOR_TYPE
  version="${RUNTIME_VERSION:-$(runtime_version)}"
  if (( SLICES == 1 )); then
    options+=("--node-id=$NAME")
  else
    options+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  if (( SPOT )); then options+=(--spot); fi
  run "${resources[@]}" create "$NAME" "${place[@]}" "${options[@]}" \
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$version" "--labels=$label"
}

# Prints the state of the queued resource and who made it; nothing where there is none.
look() {
  "${resources[@]}" list "${place[@]}" "--filter=name~/queuedResources/$NAME\$" \
    '--format=value(state.state,tpu.nodeSpec[0].node.labels.launcher)'
}

on_hosts() {
  run "${resources[@]}" ssh "$NAME" "${place[@]}" --node=all --worker=all "--command=$1"
}

on_first_host() {
  run "${resources[@]}" ssh "$NAME" "${place[@]}" --node=0 --worker=0 "--command=$1"
}

setup() {
  local archive extra=() status=0
  read -r -a extra <<< "${COPY:-}"
  archive="${TMPDIR:-/tmp}/$folder.$NAME.tar.gz"
  run tar -czf "$archive" -C "$ROOT" --exclude=__pycache__ \
    main.py setup.py pyproject.toml README.md meanflow_jax configs launch \
    ${extra[@]+"${extra[@]}"}
  {
    run "${resources[@]}" scp "$archive" "$NAME:$folder.tar.gz" "${place[@]}" \
      --node=all --worker=all \
      && on_hosts "$(install)"
  } || status=$?
  run rm -f "$archive"
  return "$status"
}

# The hosts' own Python is too old; uv brings one, into the user's home.
install() {
  printf 'set -e; mkdir -p %s; tar -xzf %s.tar.gz -C %s; cd %s; ' \
    "$folder" "$folder" "$folder" "$folder"
  printf 'PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv; '
  printf 'python3 -m uv venv --quiet --allow-existing --python %q .venv; ' "$PYTHON_VERSION"
  printf 'python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tpu]"'
}

# Prints what a host is to do with background.sh.
remote() {
  # shellcheck disable=SC2016
  printf 'cd %s && PATH="$PWD/.venv/bin:$PATH" MAX_RESTARTS=%d ' "$folder" "$MAX_RESTARTS"
  print_command launch/background.sh "$@"
}

# Sets COMMAND, as the hosts are to run it.
set_remote_command() {
  if [[ "${1:-}" == -- ]]; then shift; fi
  if [[ "${1:-}" == -* ]]; then set -- "$@" --distributed; fi
  PYTHON=python
  set_command "$@"
}

show_state() {
  run "${resources[@]}" describe "$NAME" "${place[@]}" '--format=value(state.state)'
  on_hosts "$(remote status)"
}

delete() {
  local found=""
  if ! is_dry; then
    found="$(look)"
    if [[ -z "$found" ]]; then
      printf 'tpu_pod.sh: there is no queued resource %s in %s\n' "$NAME" "$ZONE" >&2
      return
    fi
    [[ "$found" == *"${label#*=}" ]] || die "$NAME was not made by this script, and is left alone"
    printf 'tpu_pod.sh: deleting %s in %s, its hosts and their disks\n' "$NAME" "$ZONE" >&2
  fi
  run "${resources[@]}" delete "$NAME" "${place[@]}" --force --quiet
}

say() {
  printf 'tpu_pod.sh: %s\n' "$1" >&2
}

# Prints a line for each host: running, ended STATUS, stopped, none, or absent before `setup`.
report() {
  local line
  line="if test -e $folder/.venv/bin/python; then $(remote status); else echo absent; fi"
  on_hosts "$line" | grep -E '^(running|stopped|none|absent|ended [0-9]+)$' || true
}

# Starts COMMAND where it does not run.
start_missing() {
  local again
  again="($(remote status)) | grep -qx running || ($(remote start "${COMMAND[@]}"))"
  on_hosts "$again"
}

# Looks once at the hosts of a slice that is there, and does what is due. Ends the script with the
# command's exit status when it has ended everywhere, or somewhere by mistake.
look_after() {
  local lines own
  lines="$(report)"
  while read -r own; do
    if (( own != 0 )) && ! is_temporary "$own"; then
      say "the command ended with status $own; see $0 logs"
      exit "$own"
    fi
  done < <(sed -n 's/^ended //p' <<< "$lines")
  case "$lines" in
    "") say "the hosts cannot be reached" ;;
    *stopped*) say "the command was stopped"; exit 143 ;;
    *absent*) { setup && start_missing; } || count ;;
    *none* | *"ended 75"* | *"ended 1"??* | *"ended 2"??*)
      count
      start_missing || say "the command was not started everywhere, trying again"
      ;;
    *running*) ;;
    *) say "the command is done; stop paying for the slice with: $0 delete"; exit 0 ;;
  esac
}

restarts=0
count() {
  restarts=$(( restarts + 1 ))
  (( restarts <= MAX_RESTARTS )) || die "$MAX_RESTARTS restarts, giving up"
}

supervise() {
  local found
  set_remote_command "$@"
  if is_dry; then
    create
    setup
    start_missing
    return
  fi
  while :; do
    if found="$(look)"; then
      case "${found%%[[:space:]]*}" in
        "") create ;;
        ACTIVE) look_after ;;
        FAILED | SUSPENDED)
          say "the slice is ${found%%[[:space:]]*}"
          count
          delete || say "it was not deleted, trying again"
          ;;
        *) say "waiting for the slice: ${found%%[[:space:]]*}" ;;
      esac
    else
      say "gcloud cannot tell the state of $NAME, trying again"
    fi
    sleep "$POLL"
  done
}

case "$VERB" in
  create) create ;;
  setup) setup ;;
  run) set_remote_command "${REST[@]}"; on_hosts "$(remote start "${COMMAND[@]}")" ;;
  logs) on_first_host "$(remote logs)" ;;
  status) show_state ;;
  stop) on_hosts "$(remote stop)" ;;
  delete) delete ;;
  supervise) supervise "${REST[@]}" ;;
  *) wrong_verb ;;
esac

#!/usr/bin/env bash
# Runs a command, and starts it again for as long as its exit status asks for it.
#
#   launch/supervise.sh [--dry_run] COMMAND...
#
# Started again: 143 (stopped by SIGTERM, saved), any other status of 128 or more (killed, a peer
# was lost), 75 (not all hosts came in time). Not: 0, 130 (Ctrl-C), the rest (a mistake, NaN).
# SIGTERM and SIGINT go on to the command (a closed terminal as SIGTERM), after which it is not
# started again.
#
# Settings, by environment variables:
#   MAX_RESTARTS   how often it is started again at most (100)
#   RESTART_PAUSE  seconds before that (10)
#   STATUS_FILE    a file for the last exit status, written when there are no more starts (none)
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

while is_option "${1:-}"; do option "$1"; shift; done
(( $# )) || die "no command; see --help"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
RESTART_PAUSE="${RESTART_PAUSE:-10}"
require_number MAX_RESTARTS RESTART_PAUSE
if is_dry; then
  run "$@"
  exit 0
fi

child=""
pause=""
# The signal that came, if any, and the same for as long as it has nobody to go to.
told=""
kept=""

send() {
  kill -s "$1" "$2" 2> /dev/null || true
}

# shellcheck disable=SC2317,SC2329
forward() {
  told="$1"
  if [[ -n "$child" ]]; then send "$1" "$child"; else kept="$1"; fi
  if [[ -n "$pause" ]]; then send TERM "$pause"; fi
}

# Sets `status`. A signal ends `wait`, not the command; if both end at once, the command's own status
# is still to be had (127: it was had already).
wait_for_child() {
  local own
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2> /dev/null || break
  done
  own=0
  wait "$child" 2> /dev/null || own=$?
  (( own == 127 )) || status=$own
}

# A terminal that is closed (HUP) would leave the command behind.
trap 'forward TERM' TERM HUP
trap 'forward INT' INT
if [[ -n "${STATUS_FILE:-}" ]]; then rm -f -- "$STATUS_FILE"; fi
restarts=0
while :; do
  # In a process group of its own (-m) the command heeds SIGINT, and gets Ctrl-C once: from here.
  set -m
  "$@" &
  child=$!
  set +m
  if [[ -n "$kept" ]]; then send "$kept" "$child"; fi
  wait_for_child
  child=""
  if [[ -n "$told" ]] || ! is_temporary "$status"; then break; fi
  if (( restarts >= MAX_RESTARTS )); then
    printf 'supervise.sh: exit status %d after %d restarts, giving up\n' "$status" "$restarts" >&2
    break
  fi
  restarts=$(( restarts + 1 ))
  printf 'supervise.sh: exit status %d, restart %d of %d in %d s\n' \
    "$status" "$restarts" "$MAX_RESTARTS" "$RESTART_PAUSE" >&2
  sleep "$RESTART_PAUSE" &
  pause=$!
  if [[ -n "$told" ]]; then send TERM "$pause"; fi
  wait "$pause" || true
  pause=""
  if [[ -n "$told" ]]; then break; fi
done
if [[ -n "${STATUS_FILE:-}" ]]; then printf '%d\n' "$status" > "$STATUS_FILE"; fi
exit "$status"

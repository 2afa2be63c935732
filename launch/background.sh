#!/usr/bin/env bash
# Runs a supervised command in the background of this host, one at a time; tpu_pod.sh calls it on
# every host of a slice.
#
#   launch/background.sh start COMMAND...   starts it; everything it prints goes to run/log
#   launch/background.sh status             prints "running", "ended STATUS", "stopped" or "none"
#   launch/background.sh stop               SIGTERM, and waits for it to save and end
#   launch/background.sh logs               follows run/log
#
# Settings, by environment variables:
#   RUN_DIR        where log, process id and status lie (run, beside main.py)
#   STOP_TIMEOUT   seconds that `stop` waits (300)
#   MAX_RESTARTS, RESTART_PAUSE  see supervise.sh
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

while is_option "${1:-}"; do option "$1"; shift; done
(( $# )) || die "start, status, stop or logs? see --help"
verb="$1"
shift
cd "$ROOT"
RUN_DIR="${RUN_DIR:-run}"
STOP_TIMEOUT="${STOP_TIMEOUT:-300}"
require_number STOP_TIMEOUT

is_running() {
  local pid
  [[ -e "$RUN_DIR/pid" ]] || return 1
  pid="$(cat "$RUN_DIR/pid")"
  # The number may have passed to another process since.
  kill -0 "$pid" 2> /dev/null && [[ "$(ps -o args= -p "$pid")" == *supervise.sh* ]]
}

start() {
  (( $# )) || die "start what? see --help"
  if is_running; then die "a command runs already, process $(cat "$RUN_DIR/pid")"; fi
  if is_dry; then
    print_command launch/supervise.sh "$@"
    return
  fi
  mkdir -p "$RUN_DIR"
  rm -f "$RUN_DIR/status" "$RUN_DIR/stopped"
  STATUS_FILE="$RUN_DIR/status" \
    nohup setsid launch/supervise.sh "$@" >> "$RUN_DIR/log" 2>&1 < /dev/null &
  printf '%d\n' $! > "$RUN_DIR/pid"
}

state() {
  if is_running; then
    echo running
  elif [[ -e "$RUN_DIR/stopped" ]]; then
    echo stopped
  elif [[ -e "$RUN_DIR/status" ]]; then
    echo "ended $(cat "$RUN_DIR/status")"
  else
    echo none
  fi
}

stop() {
  local waited=0
  is_running || { state; return; }
  run kill "$(cat "$RUN_DIR/pid")"
  if is_dry; then return; fi
  : > "$RUN_DIR/stopped"
  while is_running; do
    (( waited < STOP_TIMEOUT )) || die "it still runs after $STOP_TIMEOUT s"
    sleep 1
    waited=$(( waited + 1 ))
  done
  state
}

case "$verb" in
  start) start "$@" ;;
  status) state ;;
  stop) stop ;;
  logs) run tail -n 100 -F "$RUN_DIR/log" ;;
  *) die "start, status, stop or logs, not '$verb'" ;;
esac

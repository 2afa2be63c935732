#!/usr/bin/env bash
# Sourced by the other scripts: help, errors, dry runs, and which exit status means "again".
set -euo pipefail

if (( BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404 )); then
  printf 'error: bash %s is too old, 4.4 is needed\n' "$BASH_VERSION" >&2
  exit 2
fi

# Where main.py is.
# shellcheck disable=SC2034
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# The comment at the head of a script is its help.
help() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH|^# shellcheck/ { sub(/^# ?/, ""); print }' "$0"
}

is_option() {
  [[ "${1:-}" == --help || "${1:-}" == --dry_run ]]
}

option() {
  if [[ "$1" == --help ]]; then
    help
    exit 0
  fi
  DRY_RUN=1
}

# Sets VERB, and REST to what follows it; options may stand before and after it.
# shellcheck disable=SC2034
set_verb() {
  VERBS="$1"
  shift
  while is_option "${1:-}"; do option "$1"; shift; done
  (( $# )) || die "$VERBS? see --help"
  VERB="$1"
  shift
  while is_option "${1:-}"; do option "$1"; shift; done
  REST=("$@")
}

wrong_verb() {
  die "$VERBS, not '$VERB'"
}

is_dry() {
  [[ "${DRY_RUN:-0}" == 1 ]]
}

# Quoted so that it can be pasted.
print_command() {
  local word separator="" plain='^[A-Za-z0-9_./:=@%+,-]+$'
  for word in "$@"; do
    [[ "$word" =~ $plain ]] || word="'${word//\'/\'\\\'\'}'"
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
  printf '\n'
}

# Runs a command; a dry run prints it instead.
run() {
  if is_dry; then print_command "$@"; else "$@"; fi
}

require() {
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || die "$name is not set; see ${0##*/} --help"
  done
}

require_name() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] \
      || die "$name must be at most 40 of a-z, 0-9 and -, from a letter on, got '${!name}'"
  done
}

require_number() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name must be a whole number, got '${!name}'"
  done
}

require_positive() {
  local name
  require_number "$@"
  for name in "$@"; do
    (( ${!name} > 0 )) || die "$name must be at least 1, got '${!name}'"
  done
}

# Sets COMMAND; flags alone are main.py's.
# shellcheck disable=SC2034
set_command() {
  if [[ "${1:-}" == -- ]]; then shift; fi
  (( $# )) || die "no command: give the flags of main.py, or a whole command; see ${0##*/} --help"
  if [[ "$1" == -* ]]; then COMMAND=("${PYTHON:-python}" main.py "$@"); else COMMAND=("$@"); fi
}

# Whether a status asks to be started again: 75 (not all hosts came in time), and what a signal or a
# lost peer ended (128 and more), but not Ctrl-C (130). The rest are mistakes, which would repeat.
is_temporary() {
  (( $1 == 75 || ($1 >= 128 && $1 != 130) ))
}

# Prints the GPU at a position among those that the calling process sees.
gpu_at() {
  local seen=()
  IFS=, read -r -a seen <<< "${CUDA_VISIBLE_DEVICES:-}"
  case "${#seen[@]}" in
    0) printf '%d' "$1" ;;
    # A scheduler has chosen already.
    1) printf '%s' "${seen[0]}" ;;
    *)
      (( $1 < ${#seen[@]} )) || die "process $1 has no GPU: CUDA_VISIBLE_DEVICES is '${seen[*]}'"
      printf '%s' "${seen[$1]}"
      ;;
  esac
}

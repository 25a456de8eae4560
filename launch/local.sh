#!/usr/bin/env bash
# Several processes on one machine as one run: starts them, passes signals on, and ends them together.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOT
usage: launch/local.sh --processes N [options] -- COMMAND

Starts N processes of COMMAND that find each other (CM3_PROCESSES, CM3_PROCESS, CM3_COORDINATOR), and puts the number
of the process before each line it prints. SIGTERM, SIGINT and SIGUSR1 are passed on to all. When one process fails,
the others have --grace-seconds to end by themselves, then they are killed. The exit status is that of the first
failure, 0 if there was none.

  launch/local.sh --processes 4 --devices-per-process 2 -- cm3 train --config=configs/quickstart.py --workdir=runs/four

  --processes N            how many
  --devices-per-process N  give each process N virtual CPU devices, and no other device
  --gpus-per-process N     give each process its own N GPUs (CUDA_VISIBLE_DEVICES)
  --grace-seconds N        after the first failure (default: 60)
  --port N                 of process 0 (default: one that is free)
  --flags NAME             flag file of the device: see launch/worker.sh (default: gpu where there is one, else cpu)
  --env NAME=VALUE         set a variable in all processes; may be repeated
  --dry-run                print the commands instead of running them
  --help                   show this
EOT
}

# A port that nothing listens at, below those that the system hands out to clients by itself.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      printf '%d\n' "$port"
      return
    fi
  done
  die "no free port found between 20000 and 32000; name one with --port"
}

# XLA_FLAGS with another number of virtual CPU devices.
cpu_flags() {
  local flag flags="--xla_force_host_platform_device_count=$1"
  for flag in ${XLA_FLAGS:-}; do
    [[ "$flag" == --xla_force_host_platform_device_count=* ]] || flags+=" $flag"
  done
  printf '%s\n' "$flags"
}

# The command of process $1, into PROCESS.
compose_process() {
  local gpus="${OPTION[gpus-per-process]}"
  PROCESS=(env "CM3_PROCESSES=${OPTION[processes]}" "CM3_PROCESS=$1" "CM3_COORDINATOR=127.0.0.1:${OPTION[port]}")
  if [[ -n "${OPTION[devices-per-process]}" ]]; then
    # Enough threads for the collectives that all devices may be in at once; with too few, they wait for each other.
    PROCESS+=(JAX_PLATFORMS=cpu "PJRT_NPROC=$((16 * OPTION[devices-per-process]))")
    PROCESS+=("XLA_FLAGS=$(cpu_flags "${OPTION[devices-per-process]}")")
  elif [[ -n "$gpus" ]]; then
    PROCESS+=("CUDA_VISIBLE_DEVICES=$(seq -s, "$(($1 * gpus))" "$((($1 + 1) * gpus - 1))")")
  fi
  PROCESS+=("${WORKER[@]}")
}

exec {terminal}>&2
tell() { say "launch/local.sh: $*" 2>&"$terminal"; }

CHILDREN=() # process ids by number; "" once ended
PRINTERS=() # who puts the numbers before the lines
STATUS=0    # of the first failure
TIMER=""    # runs while the others still may end by themselves

# Job control gives each process a group of its own, so that a signal reaches what it started, too, and Ctrl-C reaches
# this script alone, which passes it on once.
start() {
  local pipe
  exec {pipe}> >(trap '' INT TERM USR1 && exec sed -u "s/^/[$1] /")
  PRINTERS+=($!)
  compose_process "$1"
  set -m
  "${PROCESS[@]}" </dev/null >&"$pipe" 2>&1 {pipe}>&- &
  set +m
  CHILDREN[$1]=$!
  exec {pipe}>&-
}

pass_on() {
  local child
  for child in "${CHILDREN[@]}"; do
    [[ -z "$child" ]] || kill -s "$1" -- "-$child" || true
  done
}

# shellcheck disable=SC2329  # called by the traps
forward() {
  tell "passing SIG$1 on to all processes"
  pass_on "$1"
}

# How a process ended, in words.
describe() {
  if (($1 == EXIT_STOPPED)); then
    printf 'stopped before its last update (exit code %d); the same command goes on\n' "$1"
  elif (($1 > 128)) && kill -l "$1" >/dev/null 2>&1; then
    printf 'was ended by SIG%s\n' "$(kill -l "$1")"
  else
    printf 'failed with exit code %d\n' "$1"
  fi
}

note_failure() {
  local message
  message="process $1 $(describe "$2")"
  if ((STATUS == 0)); then
    STATUS="$2"
    tell "$message; the others have ${OPTION[grace-seconds]} s"
    sleep "${OPTION[grace-seconds]}" &
    TIMER=$!
  else
    tell "$message"
  fi
}

# Takes note of the processes that ended since the last call.
collect() {
  local i status
  for i in "${!CHILDREN[@]}"; do
    if [[ -n "${CHILDREN[$i]}" ]] && ! kill -0 "${CHILDREN[$i]}"; then
      status=0
      wait "${CHILDREN[$i]}" || status=$?
      CHILDREN[i]=""
      ((status == 0)) || note_failure "$i" "$status"
    fi
  done
}

end_grace() {
  local i
  if [[ -n "$TIMER" ]] && ! kill -0 "$TIMER"; then
    TIMER=""
    for i in "${!CHILDREN[@]}"; do
      [[ -z "${CHILDREN[$i]}" ]] || tell "killing process $i, which did not end"
    done
    pass_on KILL
  fi
}

# Looks around five times a second, which no lost wake-up of `wait -n` can stop. Bash itself would announce processes
# that die of a signal, with their line of this script; hence its messages go nowhere here, and tell's do not.
wait_for_all() {
  local never alive
  exec {never}<> <(:)
  while true; do
    collect
    end_grace
    alive="${CHILDREN[*]}"
    [[ -n "${alive// /}" ]] || break
    read -rt 0.2 -u "$never" || true
  done
  [[ -z "$TIMER" ]] || kill "$TIMER" || true
}

OPTION=([processes]="" [devices-per-process]="" [gpus-per-process]="" [grace-seconds]=60 [port]=0 [flags]="")
parse_options "$@"
require_given processes
require_positive processes
for name in devices-per-process gpus-per-process; do
  [[ -z "${OPTION[$name]}" ]] || require_positive "$name"
done
[[ -z "${OPTION[devices-per-process]}" || -z "${OPTION[gpus-per-process]}" ]] ||
  die "--devices-per-process (of the CPU) and --gpus-per-process exclude each other"
require_numbers grace-seconds port
require_envs
require_command
if [[ -z "${OPTION[flags]}" ]]; then
  OPTION[flags]=cpu
  if [[ -z "${OPTION[devices-per-process]}" ]] && nvidia-smi --list-gpus >/dev/null 2>&1; then
    OPTION[flags]=gpu
  fi
fi
require_flags
[[ "${OPTION[port]}" != 0 ]] || OPTION[port]="$(free_port)"
compose_worker "$ROOT/launch/worker.sh"

if [[ -n "$DRY_RUN" ]]; then
  for ((i = 0; i < OPTION[processes]; i++)); do
    compose_process "$i"
    run "${PROCESS[@]}"
  done
  exit
fi

for name in TERM INT USR1; do
  # shellcheck disable=SC2064  # the name of now
  trap "forward $name" "$name"
done
for ((i = 0; i < OPTION[processes]; i++)); do
  start "$i"
done
wait_for_all 2>/dev/null
wait "${PRINTERS[@]}" 2>/dev/null || true
exit "$STATUS"

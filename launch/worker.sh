#!/usr/bin/env bash
# One process of a run, on the machine that it runs on: sets flags and variables, then becomes the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOT
usage: launch/worker.sh [options] -- COMMAND
       launch/worker.sh --stop

Sets what a process of a run needs and becomes COMMAND, with .venv/bin of this checkout first in PATH.
The other launchers call it; by hand it is one process with the flags of its device:

  launch/worker.sh --flags gpu -- cm3 train --config=configs/lm/350m.py --workdir=runs/350m

  --flags NAME      v4, v5e, v5p, v6e, gpu, cpu: source launch/flags/NAME.sh (default: none)
  --env NAME=VALUE  set a variable; it comes before the flag file, so it wins; may be repeated
  --cluster         set CM3_CLUSTER=1: the cluster (TPU pod, SLURM) says which process this is
  --alone           refuse where a command that was started with --alone still runs
  --stop            ask the command that was started with --alone to save and leave (SIGTERM)
  --dry-run         print what would be run instead of running it
  --help            show this
EOT
}

LOCK="$ROOT/.run.lock"
PID_FILE="$ROOT/.run.pid"

still_runs() { [[ -e "$LOCK" ]] && ! flock --nonblock "$LOCK" true; }

stop() {
  if still_runs; then
    run kill -TERM "$(<"$PID_FILE")"
    say "launch/worker.sh: asked process $(<"$PID_FILE") to save and leave"
  else
    say "launch/worker.sh: nothing runs here"
  fi
}

# The lock is held by the descriptor, which the command inherits: it lasts exactly as long as the command.
take_lock() {
  local lock
  exec {lock}>"$LOCK"
  flock --nonblock "$lock" || die "process $(<"$PID_FILE") of an earlier start still runs here; --stop asks it to leave"
  printf '%d\n' "$$" >"$PID_FILE"
}

OPTION=([flags]=none)
SWITCH=([cluster]="" [alone]="" [stop]="")
parse_options "$@"
require_flags
require_envs
if [[ -n "${SWITCH[stop]}" ]]; then
  stop
  exit
fi
require_command

for pair in "${ENVS[@]}"; do
  run export "$pair"
done
if [[ -n "${SWITCH[cluster]}" ]]; then
  run export CM3_CLUSTER=1
fi
if [[ "${OPTION[flags]}" != none ]]; then
  run source "$ROOT/launch/flags/${OPTION[flags]}.sh"
fi
if [[ -d "$ROOT/.venv/bin" ]]; then
  run export "PATH=$ROOT/.venv/bin:$PATH"
fi
if [[ -n "${SWITCH[alone]}" && -z "$DRY_RUN" ]]; then
  take_lock
fi
run exec "${COMMAND[@]}"

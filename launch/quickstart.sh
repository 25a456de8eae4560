#!/usr/bin/env bash
# The whole path on one machine: environment, embedded data, training, generation, report.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<EOF
usage: launch/quickstart.sh [--dry-run] [options of cm3 quickstart]

Makes .venv where it is missing, then trains on the embedded data set and writes a report.
The same command continues a run that was stopped.

  --workdir DIR   run directory (default: $ROOT/runs/quickstart)
  --dry-run       print the commands instead of running them
  --help          show this

Where there is an NVIDIA GPU, jax is installed with CUDA.
Environment: PYTHON, the Python that makes .venv (default: python3, python3.12 or python3.11, the first that serves).
EOF
}

for argument in "$@"; do
  shift
  case "$argument" in
    --help | -h)
      usage
      exit
      ;;
    --dry-run) DRY_RUN=1 ;;
    *) set -- "$@" "$argument" ;;
  esac
done

if nvidia-smi --list-gpus >/dev/null 2>&1; then
  ensure_environment "[cuda]"
else
  ensure_environment ""
  run source "$ROOT/launch/flags/cpu.sh"
fi
run "$VENV/bin/cm3" quickstart --workdir "$ROOT/runs/quickstart" "$@"

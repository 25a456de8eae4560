#!/usr/bin/env bash
# The tests, on the CPU, in two processes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<EOF
usage: launch/test.sh [--dry-run] [options and files of pytest]

Makes .venv where it is missing, then runs the tests that are not marked slow.
Files are named from the root of the checkout; a later option wins over the script's own:

  launch/test.sh tests/unit/test_config.py -n 0
  launch/test.sh -m slow

  --dry-run       print the commands instead of running them
  --help          show this

Environment: PYTHON, the Python that makes .venv (default: python3, python3.12 or python3.11, the first that serves).
EOF
}

for argument in "$@"; do
  shift
  case "$argument" in
    --help)
      usage
      exit
      ;;
    --dry-run) DRY_RUN=1 ;;
    *) set -- "$@" "$argument" ;;
  esac
done

ensure_environment "[test]"
cd "$ROOT"
export JAX_PLATFORMS=cpu
run "$VENV/bin/python" -m pytest -n 2 --dist worksteal -m "not slow" "$@"

#!/usr/bin/env bash
# The Python environment of a machine that trains: .venv, with pinned versions.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<EOT
usage: launch/install.sh [--fetch-python] --device tpu|cuda|cpu

Makes .venv where it is missing and installs cm3jax with JAX for the device. Does nothing where that is done already.

  launch/install.sh --device cuda

  --device NAME    tpu, cuda (NVIDIA GPUs) or cpu
  --fetch-python   where no Python 3.11 or newer is found, let uv bring 3.12 (needs pip of an older Python)
  --dry-run        print the commands instead of running them
  --help           show this

Environment: PYTHON, the Python that makes .venv (default: python3, python3.12 or python3.11, the first that serves).
EOT
}

OPTION=([device]="")
SWITCH=([fetch-python]="")
parse_options "$@"
require_given device
case "${OPTION[device]}" in
  tpu | cuda) extras="[${OPTION[device]}]" ;;
  cpu) extras="" ;;
  *) die "--device is $(quoted "${OPTION[device]}"), expected tpu, cuda or cpu" ;;
esac
if [[ -n "${SWITCH[fetch-python]}" && -z "$(python_minor "$VENV/bin/python")" ]] && ! find_python >/dev/null 2>&1; then
  fetch_python
fi
ensure_environment "$extras"

# shellcheck shell=bash
# Sourced by the scripts beside it: one Python environment, .venv, at the root of the checkout.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
VENV="$ROOT/.venv"
FETCHED="" # a Python that --dry-run only says it would fetch

# Prints "3.12" for a Python that works, nothing otherwise (a pyenv shim may stand for a Python that is not there).
python_minor() {
  if [[ -n "$FETCHED" && "$1" == "$FETCHED" ]]; then
    printf '3.12\n'
    return
  fi
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Prints a Python whose packages are pinned, else one that is new enough. $PYTHON decides where it is set.
find_python() {
  local candidate minor newer=""
  if [[ -n "${PYTHON:-}" ]]; then
    set -- "$PYTHON"
  else
    set -- python3 python3.12 python3.11
  fi
  for candidate in "$@"; do
    minor="$(python_minor "$candidate")"
    if [[ -n "$minor" && -f "$ROOT/constraints-$minor.txt" ]]; then
      printf '%s\n' "$candidate"
      return
    elif [[ "$minor" == 3.* && "${minor#3.}" -gt 12 ]]; then
      newer="${newer:-$candidate}"
    fi
  done
  if [[ -z "$newer" ]]; then
    minor="$(python_minor "$1")"
    say "cm3jax needs Python 3.11 or newer; $1 is ${minor:-not there}. Install python3.12, or set PYTHON=/path/to/python"
    return 1
  fi
  say "no versions are pinned for Python $(python_minor "$newer"): installing the newest that setup.py allows"
  printf '%s\n' "$newer"
}

# Lets uv bring a Python, into $PYTHON, for machines whose own is too old (the system of TPU VMs has 3.10).
fetch_python() {
  local uv="$ROOT/.uv"
  say "fetching Python 3.12 with uv"
  run python3 -m pip install --quiet --disable-pip-version-check --upgrade --target="$uv" \
    --constraint="$ROOT/constraints-3.12.txt" uv || return 1
  run "$uv/bin/uv" python install 3.12 || return 1
  if [[ -n "$DRY_RUN" ]]; then
    FETCHED=python3.12 PYTHON=python3.12
  else
    PYTHON="$("$uv/bin/uv" python find --no-project --managed-python 3.12)"
  fi
}

# Makes .venv where there is none that works.
make_venv() {
  local python="$1"
  say "making .venv with Python $(python_minor "$python")"
  run "$python" -m venv --clear "$VENV" && return
  say "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  return 1
}

# Installs cm3jax, editable, with the extras $1, held to the constraints file $2 (may be empty). uv is several times
# faster than pip; where it cannot be had, or does not reach the packages with pip's settings, pip does it.
install_package() {
  local target="$ROOT$1" python="$VENV/bin/python"
  set -- ${2:+"--constraint=$2"}
  if run "$python" -m pip install --quiet --disable-pip-version-check "$@" uv &&
    run "$python" -m uv pip install --quiet --compile-bytecode --python "$python" "$@" --editable "$target"; then
    return
  fi
  say "uv did not install the packages; trying pip"
  run "$python" -m pip install --quiet --disable-pip-version-check "$@" --editable "$target"
}

# Makes .venv hold cm3jax with the extras $1 ("" or "[test]"); does nothing where it does already.
ensure_environment() {
  local extras="$1" python="$VENV/bin/python" pins stamp key
  if [[ -z "$(python_minor "$python")" ]]; then
    python="$(find_python)" || return 1
    make_venv "$python" || return 1
  fi
  pins="$ROOT/constraints-$(python_minor "$python").txt"
  [[ -f "$pins" ]] || pins=""

  # A change of anything that the installation depends on, the place of the checkout included, installs again.
  stamp="$VENV/.installed$extras"
  key="$ROOT $(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" ${pins:+"$pins"} | cksum)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]]; then
    return
  fi
  say "installing cm3jax$extras into .venv"
  install_package "$extras" "$pins" || return 1
  if [[ -z "$DRY_RUN" ]]; then
    printf '%s\n' "$key" >"$stamp"
  fi
}

# shellcheck shell=bash
# Sourced by the scripts beside it: how all of them speak, read options and run commands.

# shellcheck disable=SC2034  # for the scripts that source this
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN=""

# What launchers that start a run again have `cm3 train` say when a signal asked it to leave before its last update.
# shellcheck disable=SC2034  # for the scripts that source this
EXIT_STOPPED=85

say() { printf '%s\n' "$*" >&2; }

# Ends a script that was called wrongly: one line, status 2.
die() {
  say "launch/${0##*/}: $*"
  exit 2
}

# Runs a command; with --dry-run, shows it instead.
run() {
  if [[ -n "$DRY_RUN" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Writes standard input to the file $1; with --dry-run, shows a command that does.
write_file() {
  if [[ -n "$DRY_RUN" ]]; then
    printf "cat >%q <<'END_OF_FILE'\n" "$1"
    cat
    printf 'END_OF_FILE\n'
  else
    cat >"$1"
  fi
}

# The words as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# What the options of a script are: a script fills these before it calls parse_options.
declare -A OPTION=()         # name -> value, at first the default
declare -A SWITCH=()         # name -> "" or 1
declare -A LIST=([env]=ENVS) # name -> the array variable that collects its values
declare -a ENVS=() COMMAND=()

# Reads a script's words: --name=VALUE, --name VALUE, --switch, and after "--" the command to run.
parse_options() {
  local name
  while (($#)); do
    case "$1" in
      --help | -h)
        usage
        exit
        ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        COMMAND=("${@:2}")
        return
        ;;
      *)
        name="${1#--}"
        name="${name%%=*}"
        # A name is looked up only once it is known to be harmless: bash evaluates subscripts.
        [[ "$1" == --* && "$name" =~ ^[a-z][a-z-]*$ ]] || die "unexpected argument $(quoted "$1"); see --help"
        if [[ -n "${SWITCH[$name]+known}" && "$1" != *=* ]]; then
          SWITCH[$name]=1
        elif [[ "$1" == *=* ]]; then
          keep_option "$name" "${1#*=}"
        elif (($# > 1)); then
          keep_option "$name" "$2"
          shift
        else
          keep_option "$name"
        fi
        ;;
    esac
    shift
  done
}

# Keeps the value $2 of the option $1, which may be one that there is not.
keep_option() {
  local name="$1"
  if [[ -z "${OPTION[$name]+known}${LIST[$name]+known}" ]]; then
    [[ -z "${SWITCH[$name]+known}" ]] || die "--$name takes no value"
    die "unknown option --$name; see --help"
  fi
  (($# > 1)) || die "--$name needs a value"
  if [[ -n "${LIST[$name]+known}" ]]; then
    local -n values="${LIST[$name]}"
    values+=("$2")
  else
    OPTION[$name]="$2"
  fi
}

# Checks of what was read: each ends the script with one line where an option is not as it must be.

require_given() {
  local name
  for name in "$@"; do
    [[ -n "${OPTION[$name]}" ]] || die "--$name is missing; see --help"
  done
}

require_numbers() {
  local name
  for name in "$@"; do
    [[ "${OPTION[$name]}" =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
      die "--$name is $(quoted "${OPTION[$name]}"), expected a whole number"
  done
}

require_positive() {
  local name
  require_numbers "$@"
  for name in "$@"; do
    ((OPTION[$name] > 0)) || die "--$name is 0, expected at least 1"
  done
}

# Names that other systems give a meaning to (resources, partitions, images): letters, digits and . _ / : @ -
require_words() {
  local name
  for name in "$@"; do
    [[ "${OPTION[$name]}" =~ ^([A-Za-z0-9_/][A-Za-z0-9._/:@-]*)?$ ]] ||
      die "--$name is $(quoted "${OPTION[$name]}"), expected letters, digits and . _ / : @ -"
  done
}

# Names of cloud resources and Kubernetes objects.
require_names() {
  local name
  for name in "$@"; do
    [[ "${OPTION[$name]}" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
      die "--$name is $(quoted "${OPTION[$name]}"), expected at most 40 of a-z, 0-9 and -, a letter first"
  done
}

require_command() {
  ((${#COMMAND[@]})) || die "nothing to run: write the command after --, as in -- cm3 train --config=... --workdir=..."
}

require_envs() {
  local pair
  for pair in "${ENVS[@]}"; do
    [[ "${pair%%=*}" =~ ^[A-Za-z_][A-Za-z0-9_]*$ && "$pair" == *=* ]] ||
      die "--env is $(quoted "$pair"), expected NAME=VALUE"
  done
}

require_flags() {
  [[ "${OPTION[flags]}" =~ ^(v4|v5e|v5p|v6e|gpu|cpu|none)$ ]] ||
    die "--flags is $(quoted "${OPTION[flags]}"), expected v4, v5e, v5p, v6e, gpu, cpu or none"
}

# The words that start $COMMAND through launch/worker.sh, which sets the flags and variables of a process, into WORKER.
compose_worker() {
  local pair
  WORKER=("$@" "--flags=${OPTION[flags]}")
  for pair in "${ENVS[@]}"; do
    WORKER+=("--env=$pair")
  done
  WORKER+=(-- "${COMMAND[@]}")
}

# The flag file of a TPU type of Cloud TPU (v5p-32) or of GKE (tpu-v5p-slice).
chip_of() {
  case "$1" in
    v4-* | tpu-v4-podslice) printf 'v4\n' ;;
    v5litepod-* | tpu-v5-lite-podslice | tpu-v5-lite-device) printf 'v5e\n' ;;
    v5p-* | tpu-v5p-slice) printf 'v5p\n' ;;
    v6e-* | tpu-v6e-slice) printf 'v6e\n' ;;
    *) return 1 ;;
  esac
}

# Slices are joined by the axis `replica` alone: unless the command says how many replicas, there is one in each slice.
add_replica_axis() {
  local slices="$1"
  ((slices > 1)) || return 0
  [[ "${COMMAND[*]:0:2}" == "cm3 train" || "${COMMAND[*]:0:2}" == "cm3 preflight" ]] || return 0
  [[ " ${COMMAND[*]}" == *" --config.run.mesh.replica"[\ =]* ]] || COMMAND+=("--config.run.mesh.replica=$slices")
}

# shellcheck shell=bash
# Sourced by tpu_pod.sh and multi_slice.sh: TPU slices as one queued resource of Cloud TPU, from creation to deletion.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The part of --help that both scripts have.
tpu_usage() {
  cat <<EOT
run does, in this order, what is not done yet: creates the queued resource, waits until it is active, copies the commit
that is checked out here to every worker, installs it, and runs COMMAND on all of them at once. A resource that was
preempted is deleted and created anew, so after a preemption the same command goes on from the newest checkpoint.
stop asks the run to save and leave; delete gives the resource back.

  --name NAME            of the queued resource
  --zone ZONE            for example us-central2-b
  --type TYPE            accelerator type, for example v5p-32; decides the flag file of launch/flags
  --project PROJECT      (default: that of gcloud)
  --spot                 cheaper, and may be taken away at any time
  --runtime VERSION      software of the workers (default: the one for JAX on this type)
  --service-account MAIL of the workers (default: that of the project)
  --setup FILE           bash script that every worker runs after the installation, such as one that mounts the work directory
  --retries N            times to go on by itself when the run ended early (default: 0)
  --wait-minutes N       for the resource to become active (default: 1440)
  --poll-seconds N       between two looks at it (default: 30)
  --flags NAME           another flag file, or none
  --env NAME=VALUE       set a variable on all workers; may be repeated
  --gcloud-option WORD   passed on to the creation, such as --network=NAME; may be repeated
  --dry-run              print the commands instead of running them
  --help                 show this

The work directory must be one that all workers see at the same path. gcloud must be logged in, and for more than one
worker ssh-add must know the key. Start this on a machine that stays on: it shows what the workers print.
EOT
}

declare -a CREATE_OPTIONS=()

# Reads the action and the options into ACTION, OPTION and COMMAND. Scripts add their own options before.
parse_tpu_options() {
  OPTION+=([name]="" [zone]="" [type]="" [project]="" [runtime]="" ["service-account"]="" [setup]="" [retries]=0
    ["wait-minutes"]=1440 ["poll-seconds"]=30 [flags]="")
  SWITCH+=([spot]="")
  LIST+=(["gcloud-option"]=CREATE_OPTIONS)
  case "${1:-}" in
    run | stop | delete)
      ACTION="$1"
      shift
      ;;
    *) ACTION="" ;;
  esac
  parse_options "$@"
  [[ -n "$ACTION" ]] || die "the first word must be run, stop or delete; see --help"
  require_given name zone
  require_names name
  require_words zone project runtime service-account
  require_numbers retries wait-minutes poll-seconds
  require_envs
  PLACE=("--zone=${OPTION[zone]}")
  [[ -z "${OPTION[project]}" ]] || PLACE+=("--project=${OPTION[project]}")
  [[ "$ACTION" == run ]] || return 0
  require_given type
  require_words type
  require_command
  CHIP="$(chip_of "${OPTION[type]}")" ||
    die "--type is $(quoted "${OPTION[type]}"), expected a type that begins with v4-, v5litepod-, v5p- or v6e-"
  OPTION[flags]="${OPTION[flags]:-$CHIP}"
  require_flags
  [[ -z "${OPTION[setup]}" || -f "${OPTION[setup]}" ]] || die "--setup: there is no file $(quoted "${OPTION[setup]}")"
}

# Cloud TPU's names of the software for JAX: its page "TPU software versions".
runtime_of() {
  case "$1" in
    v4) printf 'tpu-ubuntu2204-base\n' ;;
    v5e) printf 'v2-alpha-tpuv5-lite\n' ;;
    v5p) printf 'v2-alpha-tpuv5\n' ;;
    v6e) printf 'v2-alpha-tpuv6e\n' ;;
  esac
}

# Creates the queued resource; the words of a script say of how many slices ("$@").
create_resource() {
  local command=(gcloud compute tpus queued-resources create "${OPTION[name]}" "$@" "${PLACE[@]}"
    "--accelerator-type=${OPTION[type]}" "--runtime-version=${OPTION[runtime]:-$(runtime_of "$CHIP")}")
  [[ -z "${SWITCH[spot]}" ]] || command+=(--spot)
  [[ -z "${OPTION[service-account]}" ]] || command+=("--service-account=${OPTION[service-account]}")
  run "${command[@]}" "${CREATE_OPTIONS[@]}"
}

# --force takes the nodes with it.
delete_resource() {
  run gcloud compute tpus queued-resources delete "${OPTION[name]}" "${PLACE[@]}" --force --quiet
}

# Prints the state of the resource, nothing where there is none. A list, because "describe" fails in the same way for a
# resource that is not there and for a login that is not valid.
resource_state() {
  local found state
  gcloud compute tpus queued-resources list "${PLACE[@]}" "--format=csv[no-heading](name.basename(),state.state)" |
    while IFS=, read -r found state; do
      [[ "$found" != "${OPTION[name]}" ]] || printf '%s\n' "$state"
    done
}

# Brings the resource into the state ACTIVE.
bring_up() {
  local state deadline=$((SECONDS + 60 * OPTION[wait-minutes])) seen="unknown"
  if [[ -n "$DRY_RUN" ]]; then
    create_resource "$@"
    return
  fi
  while true; do
    state="$(resource_state)" || die "gcloud cannot list the queued resources of ${OPTION[zone]}"
    [[ "$state" == "$seen" ]] || say "${OPTION[name]}: ${state:-not there}"
    seen="$state"
    case "$state" in
      ACTIVE) return ;;
      "") create_resource "$@" ;;
      SUSPENDED | FAILED) delete_resource ;;
      *) sleep "${OPTION[poll-seconds]}" ;;
    esac
    ((SECONDS < deadline)) || die "${OPTION[name]} did not become active within ${OPTION[wait-minutes]} minutes"
  done
}

# Runs a line on all workers at once, by the shell there.
on_workers() {
  run "${WORKERS_SSH[@]}" "--command=$1"
}

# Where an earlier run still goes on, its files stay as they are.
IDLE="[ ! -e cm3jax/.run.lock ] || flock --nonblock cm3jax/.run.lock true"
UNPACK="mkdir -p cm3jax && rm -rf cm3jax/cm3jax cm3jax/configs cm3jax/launch && tar -xzf cm3jax.tar.gz -C cm3jax"

# Brings the checked-out commit and the setup script to all workers, and installs it there.
install_on_workers() {
  local archive="$ROOT/.cm3jax.tar.gz" line
  [[ -n "$DRY_RUN" || -z "$(git -C "$ROOT" status --porcelain)" ]] ||
    say "what is not committed here is not on the workers"
  run git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD || return
  run "${WORKERS_SCP[@]}" "$archive" "${OPTION[name]}:cm3jax.tar.gz" || return
  line="{ $IDLE || { echo 'a run still goes on here; the action stop asks it to leave' >&2; exit 1; }; }"
  line+=" && $UNPACK && cm3jax/launch/install.sh --device tpu --fetch-python"
  if [[ -n "${OPTION[setup]}" ]]; then
    run "${WORKERS_SCP[@]}" "${OPTION[setup]}" "${OPTION[name]}:cm3jax-setup.sh" || return
    line+=" && bash cm3jax-setup.sh"
  fi
  on_workers "$line"
}

# Creates, installs and runs, and again while it is worth another try; the words say of how many slices.
run_on_tpu() {
  local attempt status
  compose_worker launch/worker.sh --cluster --alone "--env=CM3_EXIT_STOPPED=$EXIT_STOPPED"
  for ((attempt = 0; ; attempt++)); do
    bring_up "$@"
    status=0
    { install_on_workers && on_workers "cd cm3jax && $(quoted "${WORKER[@]}")"; } || status=$?
    ((status)) || return 0
    ((attempt < OPTION[retries])) || break
    say "the run ended early (status $status); going on"
    sleep "${OPTION[poll-seconds]}"
  done
  say "the run ended early (status $status); the same command goes on"
  return "$status"
}

# Does what ACTION says; the words say of how many slices.
tpu_main() {
  case "$ACTION" in
    run) run_on_tpu "$@" ;;
    stop) on_workers "cm3jax/launch/worker.sh --stop" ;;
    delete) delete_resource ;;
  esac
}

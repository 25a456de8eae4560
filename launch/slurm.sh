#!/usr/bin/env bash
# A run under SLURM: one process for each GPU, saved before the time limit, queued again until it is finished.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOT
usage: launch/slurm.sh --nodes N --gpus-per-node N --time LIMIT [options] -- COMMAND

Writes LOGS/NAME.sbatch and submits it. --signal-seconds before the time limit all processes get SIGUSR1: cm3 train
saves and leaves, and the job queues itself again. So it does after a failure, but no more than --max-failures times
between two orderly stops; a node that fails or a job that is preempted is queued again by SLURM. For example:

  launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu -- \\
    cm3 train --config=configs/lm/760m.py --workdir=/shared/runs/760m

  --nodes N             how many
  --gpus-per-node N     processes on a node, one for each GPU
  --time LIMIT          as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS
  --name NAME           of the job (default: cm3)
  --partition, --account, --qos NAME
  --cpus-per-task N     for each process (default: what the partition gives)
  --signal-seconds N    between SIGUSR1 and the time limit (default: 600); at least one update and one save
  --max-failures N      failures since the last orderly stop after which the job stays ended (default: 3)
  --logs DIR            script and output of the job (default: slurm under the current directory)
  --flags NAME          flag file: see launch/worker.sh (default: gpu)
  --env NAME=VALUE      set a variable in all processes; may be repeated
  --sbatch-option WORD  passed on to sbatch, such as --exclusive; may be repeated
  --dry-run             print the commands and the script instead of running them
  --help                show this

The checkout, its .venv (launch/install.sh --device cuda), the logs and the work directory must be on file systems that
all nodes share. The job runs in the current directory.
EOT
}

declare -a SBATCH_OPTIONS=()

# The directives: only values that were checked, because a line here is read by SLURM and by the shell.
print_directives() {
  printf '#SBATCH --%s\n' "job-name=${OPTION[name]}" "nodes=${OPTION[nodes]}" \
    "ntasks-per-node=${OPTION[gpus-per-node]}" "gpus-per-node=${OPTION[gpus-per-node]}" "time=${OPTION[time]}" \
    "signal=USR1@${OPTION[signal-seconds]}" requeue open-mode=append
  local name
  for name in partition account qos cpus-per-task; do
    [[ -z "${OPTION[$name]}" ]] || printf '#SBATCH --%s=%s\n' "$name" "${OPTION[$name]}"
  done
}

print_script() {
  # Not handed down from the job to its steps by itself, since SLURM 22.05.
  local cpus="${OPTION[cpus-per-task]:+ --cpus-per-task=${OPTION[cpus-per-task]}}"
  printf '#!/usr/bin/env bash\n# Written by launch/slurm.sh.\n'
  print_directives
  cat <<EOT
set -uo pipefail
failures=$(quoted "$LOGS")/${OPTION[name]}-\$SLURM_JOB_ID.failures
command=(
  $(quoted "${WORKER[@]}")
)

# Every process sees all GPUs of its node, and JAX gives it the one of its number there. Processes end themselves when
# another one is gone; after two minutes srun helps.
srun$cpus --gpu-bind=none --kill-on-bad-exit=0 --wait=120 "\${command[@]}"
status=\$?

case "\$status" in
  0) exit 0 ;;
  $EXIT_STOPPED)
    rm -f "\$failures"
    echo "saved and stopped before the last update: queueing again"
    ;;
  *)
    printf '%s status %d\n' "\$(date)" "\$status" >>"\$failures"
    count=\$(wc -l <"\$failures")
    if ((count > ${OPTION[max-failures]})); then
      echo "failure \$count since the last orderly stop, status \$status: not queued again"
      exit "\$status"
    fi
    echo "failure \$count since the last orderly stop, status \$status: queueing again"
    ;;
esac
scontrol requeue "\$SLURM_JOB_ID"
EOT
}

OPTION=([nodes]="" [gpus-per-node]="" [time]="" [name]=cm3 [partition]="" [account]="" [qos]="" [cpus-per-task]=""
  [signal-seconds]=600 [max-failures]=3 [logs]="" [flags]=gpu)
LIST+=([sbatch-option]=SBATCH_OPTIONS)
parse_options "$@"
require_given nodes gpus-per-node time
require_positive nodes gpus-per-node signal-seconds
require_numbers max-failures
[[ -z "${OPTION[cpus-per-task]}" ]] || require_positive cpus-per-task
require_words name partition account qos
[[ "${OPTION[name]}" =~ ^[A-Za-z0-9._-]+$ ]] || die "--name is $(quoted "${OPTION[name]}"), expected no / : @"
[[ "${OPTION[time]}" =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
  die "--time is $(quoted "${OPTION[time]}"), expected minutes, HH:MM:SS or D-HH:MM:SS"
require_flags
require_envs
require_command

case "${OPTION[logs]}" in
  /*) LOGS="${OPTION[logs]}" ;;
  *) LOGS="$PWD/${OPTION[logs]:-slurm}" ;;
esac
compose_worker "$ROOT/launch/worker.sh" --cluster "--env=CM3_EXIT_STOPPED=$EXIT_STOPPED"
run mkdir -p "$LOGS"
print_script | write_file "$LOGS/${OPTION[name]}.sbatch"
# In these paths SLURM replaces %x and the like; a percent sign of the user's own is doubled.
run sbatch "--chdir=$PWD" "--output=${LOGS//%/%%}/%x-%j.out" "${SBATCH_OPTIONS[@]}" "$LOGS/${OPTION[name]}.sbatch"

#!/usr/bin/env bash
# One TPU pod slice by a queued resource of Cloud TPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

usage() {
  cat <<EOT
usage: launch/tpu_pod.sh run --name NAME --zone ZONE --type TYPE [options] -- COMMAND
       launch/tpu_pod.sh stop|delete --name NAME --zone ZONE [--project PROJECT]

One TPU pod slice, all its workers as one run. For example:

  launch/tpu_pod.sh run --name cm3 --zone us-central2-b --type v4-32 --spot --setup mount.sh -- \\
    cm3 train --config=configs/lm/350m.py --workdir=/mnt/runs/350m

EOT
  tpu_usage
}

parse_tpu_options "$@"
WORKERS_SSH=(gcloud compute tpus tpu-vm ssh "${OPTION[name]}" "${PLACE[@]}" --worker=all)
WORKERS_SCP=(gcloud compute tpus tpu-vm scp "${PLACE[@]}" --worker=all)
tpu_main "--node-id=${OPTION[name]}"

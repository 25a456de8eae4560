#!/usr/bin/env bash
# Several TPU slices as one run, by one queued resource of Cloud TPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"

usage() {
  cat <<EOT
usage: launch/multi_slice.sh run --slices N --name NAME --zone ZONE --type TYPE [options] -- COMMAND
       launch/multi_slice.sh stop|delete --name NAME --zone ZONE [--project PROJECT]

N equal TPU slices, joined by the data-centre network: the runtime tells every worker its slice (MEGASCALE variables),
and the mesh axis "replica" goes across slices. A command "cm3 train" or "cm3 preflight" that does not set the axis gets
--config.run.mesh.replica=N. For example:

  launch/multi_slice.sh run --slices 2 --name cm3 --zone us-east5-a --type v5p-64 --setup mount.sh -- \\
    cm3 train --config=configs/lm/7b.py --workdir=/mnt/runs/7b

  --slices N             how many, at least 2
EOT
  tpu_usage
}

OPTION=([slices]="")
parse_tpu_options "$@"
if [[ "$ACTION" == run ]]; then
  require_given slices
  require_positive slices
  ((OPTION[slices] > 1)) || die "--slices is 1; launch/tpu_pod.sh is for one slice"
  add_replica_axis "${OPTION[slices]}"
fi
# All at once, whatever their number: by default gcloud would start 64 and wait for them to end.
EVERYWHERE=("${PLACE[@]}" --node=all --worker=all --batch-size=all)
WORKERS_SSH=(gcloud compute tpus queued-resources ssh "${OPTION[name]}" "${EVERYWHERE[@]}")
WORKERS_SCP=(gcloud compute tpus queued-resources scp "${EVERYWHERE[@]}")
tpu_main "--node-count=${OPTION[slices]}" "--node-prefix=${OPTION[name]}"

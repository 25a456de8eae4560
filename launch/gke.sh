#!/usr/bin/env bash
# A run on Kubernetes (GKE) as a JobSet: TPU slices or GPU nodes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOT
usage: launch/gke.sh run --name NAME --image IMAGE --tpu TYPE --topology XxYxZ --hosts N [options] -- COMMAND
       launch/gke.sh run --name NAME --image IMAGE --gpu TYPE --hosts N [options] -- COMMAND
       launch/gke.sh delete --name NAME

Renders a JobSet and applies it with kubectl; the cluster must have the JobSet controller. A pod that is preempted, or
a run that a signal stopped, restarts without limit; a failure restarts all pods, at most --max-restarts times. Every
start goes on from the newest checkpoint. For example:

  launch/gke.sh run --name cm3 --image REGISTRY/cm3jax:tpu --tpu tpu-v5p-slice --topology 2x2x4 --hosts 4 \\
    --bucket my-runs -- cm3 train --config=configs/lm/350m.py --workdir=/data/runs/350m

  --name NAME             of the JobSet
  --image IMAGE           built from launch/docker
  --tpu TYPE              tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
  --topology XxY[xZ]      of a slice
  --gpu TYPE              as the nodes' label gke-accelerator says, such as nvidia-h100-80gb; one process for each node
  --hosts N               pods: the machines of one slice, or the GPU nodes
  --chips N               TPU chips (default: 4) or GPUs (default: 8) of one machine
  --slices N              TPU slices; a command "cm3 train" or "cm3 preflight" that does not set the mesh axis "replica"
                          gets --config.run.mesh.replica=N (default: 1)
  --bucket NAME           Cloud Storage bucket for the work directory, mounted by the Cloud Storage FUSE driver
  --claim NAME            or a PersistentVolumeClaim that many pods may write
  --mount DIR             where (default: /data)
  --service-account NAME  of the pods; it must be allowed to write the bucket
  --spot                  on spot nodes
  --max-restarts N        (default: 10)
  --grace-seconds N       for a pod to save when it must leave (default: 300)
  --user ID               user of the processes (default: 1000, the image's own)
  --privileged            for clusters that give the devices to privileged containers only
  --namespace, --context NAME
  --flags NAME            flag file (default: the one of the chip): see launch/worker.sh
  --env NAME=VALUE        set a variable in all processes; may be repeated
  --dry-run               print the JobSet instead of applying it
  --help                  show this
EOT
}

# A YAML string, double-quoted: whatever it holds (but control characters, see check_options), it stays one string.
yaml() {
  local text="$1"
  text="${text//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//$'\n'/\\n}"
  text="${text//$'\t'/\\t}"
  printf '"%s"' "$text"
}

# A string in a place where Kubernetes itself would replace $(NAME).
yaml_literal() { yaml "${1//\$/\$\$}"; }

# Prints lines at the depth of $1 spaces.
indent() { sed "s/^/$(printf '%*s' "$1" '')/"; }

print_failure_rules() {
  cat <<EOT
backoffLimit: 0
podFailurePolicy:
  rules:
    - action: FailJob
      onPodConditions:
        - type: DisruptionTarget
    - action: FailJob
      onExitCodes:
        containerName: cm3
        operator: In
        values: [$EXIT_STOPPED]
EOT
}

print_node_selector() {
  printf 'nodeSelector:\n'
  if [[ -n "${OPTION[tpu]}" ]]; then
    printf '  cloud.google.com/gke-tpu-accelerator: %s\n' "$(yaml "${OPTION[tpu]}")"
    printf '  cloud.google.com/gke-tpu-topology: %s\n' "$(yaml "${OPTION[topology]}")"
  else
    printf '  cloud.google.com/gke-accelerator: %s\n' "$(yaml "${OPTION[gpu]}")"
  fi
  [[ -z "${SWITCH[spot]}" ]] || printf '  cloud.google.com/gke-spot: "true"\n'
}

# Spot nodes and GPU nodes refuse pods that do not say that they may come there.
print_tolerations() {
  local key
  [[ -n "${SWITCH[spot]}${OPTION[gpu]}" ]] || return 0
  printf 'tolerations:\n'
  for key in ${SWITCH[spot]:+cloud.google.com/gke-spot} ${OPTION[gpu]:+nvidia.com/gpu}; do
    printf '  - {key: %s, operator: Exists, effect: NoSchedule}\n' "$(yaml "$key")"
  done
}

print_volumes() {
  printf 'volumes:\n'
  if [[ -n "${OPTION[bucket]}" ]]; then
    cat <<EOT
  - name: work
    csi:
      driver: gcsfuse.csi.storage.gke.io
      volumeAttributes:
        bucketName: $(yaml "${OPTION[bucket]}")
        mountOptions: "implicit-dirs,rename-dir-limit=100000,uid=${OPTION[user]},gid=${OPTION[user]}"
EOT
  elif [[ -n "${OPTION[claim]}" ]]; then
    printf '  - name: work\n    persistentVolumeClaim:\n      claimName: %s\n' "$(yaml "${OPTION[claim]}")"
  fi
  # NCCL and data workers pass more through shared memory than the 64 MB that a container has by itself.
  printf '  - name: shared-memory\n    emptyDir: {medium: Memory}\n'
}

# The variables by which processes find each other. TPU pods get theirs from GKE; pods with GPUs are told here, since
# JAX would need a client of the Kubernetes API for it.
print_environment() {
  printf 'env:\n'
  if [[ -n "${OPTION[tpu]}" ]]; then
    printf '  - {name: CM3_CLUSTER, value: "1"}\n'
    return
  fi
  cat <<EOT
  - {name: CM3_PROCESSES, value: $(yaml "${OPTION[hosts]}")}
  - {name: CM3_COORDINATOR, value: $(yaml "${OPTION[name]}-workers-0-0.${OPTION[name]}:8482")}
  - name: CM3_PROCESS
    valueFrom:
      fieldRef:
        fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
EOT
}

print_container() {
  local word resource="google.com/tpu"
  [[ -z "${OPTION[gpu]}" ]] || resource="nvidia.com/gpu"
  printf 'name: cm3\nimage: %s\ncommand:\n' "$(yaml "${OPTION[image]}")"
  for word in "${WORKER[@]}"; do
    printf '  - %s\n' "$(yaml_literal "$word")"
  done
  print_environment
  printf 'resources:\n  limits: {%s: %d}\n' "$resource" "${OPTION[chips]}"
  [[ -z "${OPTION[tpu]}" ]] || printf 'ports:\n  - containerPort: 8471\n  - containerPort: 8080\n'
  [[ -z "${SWITCH[privileged]}" ]] || printf 'securityContext: {privileged: true}\n'
  printf 'volumeMounts:\n  - {name: shared-memory, mountPath: /dev/shm}\n'
  [[ -z "${OPTION[bucket]}${OPTION[claim]}" ]] || printf '  - {name: work, mountPath: %s}\n' "$(yaml "${OPTION[mount]}")"
}

print_pod() {
  printf 'restartPolicy: Never\nterminationGracePeriodSeconds: %d\n' "${OPTION[grace-seconds]}"
  [[ -z "${OPTION[service-account]}" ]] || printf 'serviceAccountName: %s\n' "$(yaml "${OPTION[service-account]}")"
  # The group owns what is mounted, so that a user who is not root can write it.
  printf 'securityContext: {runAsUser: %d, fsGroup: %d}\n' "${OPTION[user]}" "${OPTION[user]}"
  # Slices talk over the network of their machines, without the detour of a pod network.
  ((OPTION[slices] == 1)) || printf 'hostNetwork: true\ndnsPolicy: ClusterFirstWithHostNet\n'
  print_node_selector
  print_tolerations
  print_volumes
  printf 'containers:\n  -\n'
  print_container | indent 4
}

print_pod_metadata() {
  [[ -z "${OPTION[bucket]}" ]] || printf 'metadata:\n  annotations: {gke-gcsfuse/volumes: "true"}\n'
}

print_jobset() {
  printf 'apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\nmetadata:\n  name: %s\n' "$(yaml "${OPTION[name]}")"
  # One slice is one node pool, and shares it with no other.
  [[ -z "${OPTION[tpu]}" ]] ||
    printf '  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}\n'
  cat <<EOT
spec:
  failurePolicy:
    maxRestarts: ${OPTION[max-restarts]}
    rules:
      - name: preempted_or_stopped
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: ${OPTION[slices]}
      template:
        spec:
          parallelism: ${OPTION[hosts]}
          completions: ${OPTION[hosts]}
          completionMode: Indexed
EOT
  print_failure_rules | indent 10
  printf '          template:\n'
  print_pod_metadata | indent 12
  printf '            spec:\n'
  print_pod | indent 14
}

check_options() {
  require_given image hosts
  require_words image tpu gpu bucket claim service-account
  require_positive hosts slices
  require_numbers max-restarts grace-seconds user
  [[ "${OPTION[mount]}" == /?* ]] || die "--mount is $(quoted "${OPTION[mount]}"), expected an absolute path"
  [[ -z "${OPTION[bucket]}" || -z "${OPTION[claim]}" ]] || die "--bucket and --claim exclude each other"
  [[ -n "${OPTION[tpu]}${OPTION[gpu]}" ]] || die "--tpu or --gpu is missing; see --help"
  [[ -z "${OPTION[tpu]}" || -z "${OPTION[gpu]}" ]] || die "--tpu and --gpu exclude each other"
  if [[ -n "${OPTION[tpu]}" ]]; then
    [[ "${OPTION[topology]}" =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
      die "--topology is $(quoted "${OPTION[topology]}"), expected as in 4x4 or 2x2x4"
    CHIP="$(chip_of "${OPTION[tpu]}")" || die "--tpu is $(quoted "${OPTION[tpu]}"), expected one that --help names"
    OPTION[chips]="${OPTION[chips]:-4}"
  else
    ((OPTION[slices] == 1)) || die "--slices is for TPUs"
    CHIP=gpu
    OPTION[chips]="${OPTION[chips]:-8}"
  fi
  require_positive chips
  OPTION[flags]="${OPTION[flags]:-$CHIP}"
  require_flags
  require_envs
  require_command
  local word
  for word in "${OPTION[mount]}" "${ENVS[@]}" "${COMMAND[@]}"; do
    word="${word//[$'\n\t']/}"
    [[ ! "$word" =~ [[:cntrl:]] ]] || die "$(quoted "$word") holds a control character"
  done
}

OPTION=([name]="" [image]="" [tpu]="" [topology]="" [gpu]="" [hosts]="" [chips]="" [slices]=1 [bucket]="" [claim]=""
  [mount]=/data [service-account]="" [max-restarts]=10 [grace-seconds]=300 [user]=1000 [namespace]="" [context]="" [flags]="")
SWITCH=([spot]="" [privileged]="")
ACTION=""
if [[ "${1:-}" =~ ^(run|delete)$ ]]; then
  ACTION="$1"
  shift
fi
parse_options "$@"
[[ -n "$ACTION" ]] || die "the first word must be run or delete; see --help"
require_given name
require_names name
require_words namespace context
KUBECTL=(kubectl)
[[ -z "${OPTION[context]}" ]] || KUBECTL+=("--context=${OPTION[context]}")
[[ -z "${OPTION[namespace]}" ]] || KUBECTL+=("--namespace=${OPTION[namespace]}")
if [[ "$ACTION" == delete ]]; then
  run "${KUBECTL[@]}" delete jobset "${OPTION[name]}"
  exit
fi
check_options
add_replica_axis "${OPTION[slices]}"
compose_worker launch/worker.sh "--env=CM3_EXIT_STOPPED=$EXIT_STOPPED"
JOBSET="$(print_jobset)"
if [[ -n "$DRY_RUN" ]]; then
  printf '# for %s\n%s\n' "$(quoted "${KUBECTL[@]}" apply --filename=-)" "$JOBSET"
else
  "${KUBECTL[@]}" apply --filename=- <<<"$JOBSET"
fi

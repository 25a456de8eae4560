"""launch/gke.sh: the JobSet it renders."""

import re

import pytest
import yaml

TPU = ["--tpu", "tpu-v5p-slice", "--topology", "2x2x4", "--hosts", "4"]
GPU = ["--gpu", "nvidia-h100-80gb", "--hosts", "3"]
RUN = ["--", "cm3", "train", "--config=configs/x.py", "--workdir=/data/run"]
STOPPED = "--env=CM3_EXIT_STOPPED=85"


def jobset(shell, *words):
    text = shell.dry("gke.sh", "run", "--name", "big", "--image", "registry/cm3jax:1", *words)
    return yaml.safe_load(text)


def parts(document):
    """The replicated job, its job and its pod."""
    (workers,) = document["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    return workers, job, job["template"]["spec"]


def expanded(text):
    """What Kubernetes makes of a command's word: $$ is $, and $(NAME) the variable, where there is one."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda match: "$" if match[0] == "$$" else f"EXPANDED {match[1]}", text)


def environment(container):
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def test_a_tpu_slice(shell):
    document = jobset(shell, *TPU, *RUN)
    workers, job, pod = parts(document)
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert document["metadata"] == {
        "name": "big",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert workers["replicas"] == 1
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/cm3jax:1"
    assert container["command"] == ["launch/worker.sh", STOPPED, "--flags=v5p", *RUN]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert environment(container) == {"CM3_CLUSTER": "1"}
    assert pod["securityContext"] == {"runAsUser": 1000, "fsGroup": 1000}
    assert "hostNetwork" not in pod and "tolerations" not in pod and "serviceAccountName" not in pod


def test_what_restarts_and_how_often(shell):
    document = jobset(shell, *TPU, "--max-restarts", "5", "--grace-seconds", "90", *RUN)
    _, job, pod = parts(document)
    # Preempted, or left because a signal asked: the job fails for a reason that restarts without limit.
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 5
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "cm3", "operator": "In", "values": [85]}},
    ]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)


def test_slices_get_the_replica_axis_and_the_network_of_their_machines(shell):
    workers, job, pod = parts(jobset(shell, *TPU, "--slices", "2", *RUN))
    assert (workers["replicas"], job["parallelism"]) == (2, 4)
    assert pod["containers"][0]["command"][-1] == "--config.run.mesh.replica=2"
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_gpu_nodes_are_told_who_they_are(shell):
    document = jobset(shell, *GPU, *RUN)
    workers, job, pod = parts(document)
    assert "annotations" not in document["metadata"]
    assert (workers["name"], workers["replicas"], job["parallelism"]) == ("workers", 1, 3)
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["command"][:3] == ["launch/worker.sh", STOPPED, "--flags=gpu"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert environment(container) == {
        "CM3_PROCESSES": "3",
        # JobSet's name for the first pod: JobSet, replicated job, numbers of job and pod, and the JobSet's own domain.
        "CM3_COORDINATOR": "big-workers-0-0.big:8482",
        "CM3_PROCESS": {"fieldRef": {"fieldPath": index}},
    }
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_work_directory_in_a_bucket(shell):
    document = jobset(shell, *TPU, "--bucket", "my-runs", "--mount", "/a b", "--user", "7", *RUN)
    _, job, pod = parts(document)
    assert job["template"]["metadata"] == {"annotations": {"gke-gcsfuse/volumes": "true"}}
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "work")
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    attributes = volume["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "my-runs"
    # Without the limit, a checkpoint's folder could not get its name.
    assert attributes["mountOptions"] == "implicit-dirs,rename-dir-limit=100000,uid=7,gid=7"
    assert {"name": "work", "mountPath": "/a b"} in pod["containers"][0]["volumeMounts"]


def test_work_directory_on_a_claim(shell):
    _, job, pod = parts(jobset(shell, *GPU, "--claim", "shared-disk", *RUN))
    assert {"name": "work", "persistentVolumeClaim": {"claimName": "shared-disk"}} in pod["volumes"]
    assert {"name": "work", "mountPath": "/data"} in pod["containers"][0]["volumeMounts"]
    assert "metadata" not in job["template"]


def test_spot_service_account_and_privileges(shell):
    _, _, pod = parts(jobset(shell, *TPU, "--spot", "--service-account", "trainer", "--privileged", *RUN))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["cloud.google.com/gke-spot"]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["containers"][0]["securityContext"] == {"privileged": True}


def test_every_word_stays_one_string_in_yaml_and_in_kubernetes(shell, hostile):
    words = [*hostile, "yes", "12", "null", "a: b", "- a", "# a", "{a}", "two\nlines\tand tab", "'", '"', "$$$(A)$", ""]
    (container,) = parts(jobset(shell, *TPU, *(f"--env=A={word}" for word in words), "--", *words))[2]["containers"]
    found = [expanded(word) for word in container["command"]]
    assert found == ["launch/worker.sh", STOPPED, "--flags=v5p", *(f"--env=A={word}" for word in words), "--", *words]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("tpu-v4-podslice", "v4"),
        ("tpu-v5-lite-podslice", "v5e"),
        ("tpu-v5p-slice", "v5p"),
        ("tpu-v6e-slice", "v6e"),
    ],
)
def test_the_chip_decides_the_flags(shell, kind, flags):
    words = ["--tpu", kind, "--topology", "4x4", "--hosts", "4", "--chips", "8"]
    (container,) = parts(jobset(shell, *words, *RUN))[2]["containers"]
    assert container["command"][2] == f"--flags={flags}"
    assert container["resources"] == {"limits": {"google.com/tpu": 8}}


def test_kubectl_gets_what_the_dry_run_prints(shell):
    words = ["run", "--name", "big", "--image", "i", *TPU, "--namespace", "ml", "--context", "c1", *RUN]
    shell.fake("kubectl", f"cat >'{shell.programs}/applied'")
    assert shell("gke.sh", *words).returncode == 0
    assert shell.calls() == [["kubectl", "--context=c1", "--namespace=ml", "apply", "--filename=-"]]
    first, _, printed = shell.dry("gke.sh", *words).partition("\n")
    assert first == "# for kubectl --context=c1 --namespace=ml apply --filename=-"
    assert (shell.programs / "applied").read_text() == printed


def test_delete(shell):
    shell.fake("kubectl")
    assert shell("gke.sh", "delete", "--name", "big", "--namespace", "ml").returncode == 0
    assert shell.calls() == [["kubectl", "--namespace=ml", "delete", "jobset", "big"]]


def test_kubectl_that_fails_is_no_success(shell):
    shell.fake("kubectl", "exit 3")
    assert shell("gke.sh", "run", "--name", "big", "--image", "i", *TPU, *RUN).returncode == 3

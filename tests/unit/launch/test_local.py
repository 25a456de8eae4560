"""launch/local.sh with real processes, small ones: how they start, end, fail and are told to stop."""

import signal
import subprocess
import sys

import pytest

HANDLERS = """
import signal, sys, time
def leave(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(85 if number == signal.SIGUSR1 else 9)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, leave)
print("ready", flush=True)
time.sleep(30)
"""


def python(code):
    return ["--", sys.executable, "-c", f"import os; process = int(os.environ['CM3_PROCESS'])\n{code}"]


def test_processes_get_their_numbers_and_every_line_has_its_own(shell):
    show = "print(process, os.environ['CM3_PROCESSES'], os.environ['CM3_COORDINATOR'])\nos.write(2, b'error\\nend\\n')"
    done = shell("local.sh", "--processes", "3", *python(show))
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    coordinators = {line.split()[-1] for line in lines if "127.0.0.1" in line}
    assert len(coordinators) == 1
    coordinator = coordinators.pop()
    expected = [line for i in range(3) for line in (f"[{i}] {i} 3 {coordinator}", f"[{i}] end", f"[{i}] error")]
    assert sorted(lines) == expected


def test_a_failure_is_named_and_the_others_may_end_by_themselves(shell):
    code = "import time\nif process == 1: raise SystemExit(7)\ntime.sleep(0.6)\nprint('in order')"
    done = shell("local.sh", "--processes", "3", "--grace-seconds", "20", *python(code))
    assert done.returncode == 7
    assert done.stderr.splitlines() == ["launch/local.sh: process 1 failed with exit code 7; the others have 20 s"]
    assert sorted(done.stdout.splitlines()) == ["[0] in order", "[2] in order"]


def test_who_does_not_end_in_time_is_killed(shell):
    code = "import signal, time\nif process == 1: raise SystemExit(3)\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(30)"
    done = shell("local.sh", "--processes", "2", "--grace-seconds", "0", *python(code))
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "launch/local.sh: process 1 failed with exit code 3; the others have 0 s",
        "launch/local.sh: killing process 0, which did not end",
        "launch/local.sh: process 0 was ended by SIGKILL",
    ]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_process_that_a_signal_ends_is_named_with_the_signal(shell, name):
    code = f"import signal\nif process == 0: os.kill(os.getpid(), signal.{name})"
    done = shell("local.sh", "--processes", "2", "--grace-seconds", "9", *python(code))
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr.splitlines() == [f"launch/local.sh: process 0 was ended by {name}; the others have 9 s"]


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores SIGINT, these tests perhaps, and so would all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("SIGTERM", 9, "failed with exit code 9"),
        ("SIGINT", 9, "failed with exit code 9"),
        ("SIGUSR1", 85, "stopped before its last update (exit code 85); the same command goes on"),
    ],
)
def test_signals_are_passed_on_to_all(shell, name, status, words):
    with subprocess.Popen(
        [shell.checkout / "launch" / "local.sh", "--processes", "2", *python(HANDLERS)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=shell.environment, cwd=shell.cwd,
    ) as launcher:  # fmt: skip
        assert {launcher.stdout.readline(), launcher.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(getattr(signal, name))
        out, error = launcher.communicate(timeout=20)
    assert launcher.returncode == status
    assert sorted(out.splitlines()) == [f"[0] got {name}", f"[1] got {name}"]
    assert error.splitlines()[0] == f"launch/local.sh: passing {name} on to all processes"
    assert all(any(f"process {i} {words}" in line for line in error.splitlines()) for i in (0, 1))


def test_what_a_process_started_gets_the_signal_too(shell):
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HANDLERS!r}])"
    with subprocess.Popen(
        [shell.checkout / "launch" / "local.sh", "--processes", "1", *python(nested)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=shell.environment, cwd=shell.cwd,
    ) as launcher:  # fmt: skip
        assert launcher.stdout.readline() == "[0] ready\n"
        launcher.send_signal(signal.SIGTERM)
        assert launcher.communicate(timeout=20)[0] == "[0] got SIGTERM\n"


def test_dry_run_prints_a_command_for_each_process_that_can_be_pasted(shell, hostile):
    flags = "--xla_cpu_x=1 --xla_force_host_platform_device_count=8"
    words = ["--processes=2", "--devices-per-process=3", "--port=2345", "--env=A=b c"]
    printed = shell.dry("local.sh", *words, "--", "cm3", "train", *hostile, XLA_FLAGS=flags)
    for i, line in enumerate(printed.splitlines()):
        env, *variables, worker, flag, variable, dashes = shell.words(line)[: -2 - len(hostile)]
        assert env == "env"
        assert variables == [
            "CM3_PROCESSES=2", f"CM3_PROCESS={i}", "CM3_COORDINATOR=127.0.0.1:2345", "JAX_PLATFORMS=cpu",
            "PJRT_NPROC=48",
            "XLA_FLAGS=--xla_force_host_platform_device_count=3 --xla_cpu_x=1",
        ]  # fmt: skip
        assert worker == str(shell.checkout / "launch" / "worker.sh")
        assert (flag, variable, dashes) == ("--flags=cpu", "--env=A=b c", "--")
        assert shell.words(line)[-2 - len(hostile) :] == ["cm3", "train", *hostile]
    assert i == 1


def test_gpus_are_shared_out_and_bring_their_flags(shell):
    shell.fake("nvidia-smi")
    printed = shell.dry("local.sh", "--processes=2", "--gpus-per-process=2", "--", "cm3")
    first, second = map(shell.words, printed.splitlines())
    assert "CUDA_VISIBLE_DEVICES=0,1" in first and "CUDA_VISIBLE_DEVICES=2,3" in second
    assert "--flags=gpu" in first and "--flags=gpu" in second
    shell.fake("nvidia-smi", "exit 9")
    assert "--flags=cpu" in shell.dry("local.sh", "--processes=1", "--", "cm3")

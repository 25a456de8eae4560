"""launch/slurm.sh: the script it writes, run with stand-ins for srun and scontrol."""

import subprocess
from pathlib import Path

import pytest

JOB = ["slurm.sh", "--nodes", "2", "--gpus-per-node", "4", "--time", "1-12:00:00"]
RUN = ["--", "cm3", "train", "--config=configs/x.py", "--workdir=/shared/run"]


def directives(script):
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def submit(shell, *words):
    """The script that is submitted, and the words of sbatch."""
    shell.fake("sbatch")
    done = shell(*words)
    assert done.returncode == 0, done.stderr
    (call,) = shell.calls()
    (shell.programs / "calls").unlink()
    return call[-1], call


def test_one_process_for_each_gpu_a_signal_before_the_limit_and_requeue(shell):
    words = ["--partition", "gpu", "--account", "a", "--qos", "q", "--cpus-per-task", "6", "--signal-seconds", "900"]
    path, call = submit(shell, *JOB, "--name", "big", *words, "--sbatch-option", "--exclude=node 1", *RUN)
    script = Path(path).read_text()
    assert path == str(shell.cwd / "slurm" / "big.sbatch")
    assert directives(script) == [
        *["job-name=big", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=1-12:00:00"],
        *["signal=USR1@900", "requeue", "open-mode=append", "partition=gpu", "account=a", "qos=q", "cpus-per-task=6"],
    ]
    assert call == [
        *["sbatch", f"--chdir={shell.cwd}", f"--output={shell.cwd}/slurm/%x-%j.out", "--exclude=node 1", path],
    ]


def run_job(shell, path, *statuses):
    """Runs the written script once for each exit status of srun; its exit statuses and what it printed."""
    results = []
    for status in statuses:
        shell.fake("srun", f"exit {status}")
        shell.fake("scontrol")
        done = subprocess.run(
            ["bash", path], env=shell.environment | {"SLURM_JOB_ID": "17"}, check=False,
            capture_output=True, text=True, cwd=shell.cwd,
        )  # fmt: skip
        assert done.stderr == ""
        results.append((done.returncode, done.stdout))
    return results


def test_srun_gets_the_command_as_it_was_written(shell, hostile):
    logs = "log $(touch hacked) 'files' %j"
    path, call = submit(shell, *JOB, "--logs", logs, f"--env=A={hostile[0]}", "--", *hostile)
    assert path == str(shell.cwd / logs / "cm3.sbatch")
    # SLURM would put the number of the job in place of %j.
    assert f"--output={shell.cwd}/log $(touch hacked) 'files' %%j/%x-%j.out" in call
    run_job(shell, path, 0)
    (srun,) = shell.calls()
    assert not (shell.cwd / "hacked").exists()
    worker = srun.index(str(shell.checkout / "launch" / "worker.sh"))
    assert srun[1:worker] == ["--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=120"]
    assert srun[worker + 1 :] == [
        "--cluster",
        "--env=CM3_EXIT_STOPPED=85",
        "--flags=gpu",
        f"--env=A={hostile[0]}",
        "--",
        *hostile,
    ]


def test_a_finished_run_is_not_queued_again(shell):
    path, _ = submit(shell, *JOB, *RUN)
    assert run_job(shell, path, 0) == [(0, "")]
    assert [call[0] for call in shell.calls()] == ["srun"]


def test_a_run_that_saved_and_left_is_queued_again(shell):
    path, _ = submit(shell, *JOB, *RUN)
    ((status, printed),) = run_job(shell, path, 85)
    assert status == 0
    assert "queueing again" in printed
    assert shell.calls()[-1] == ["scontrol", "requeue", "17"]


def test_failures_are_counted_between_orderly_stops(shell):
    path, _ = submit(shell, *JOB, "--max-failures", "2", *RUN)
    results = run_job(shell, path, 1, 87, 85, 1, 139, 87)
    assert [status for status, _ in results] == [0, 0, 0, 0, 0, 87]
    assert "failure 3 since the last orderly stop, status 87: not queued again" in results[-1][1]
    assert [call[0] for call in shell.calls()].count("scontrol") == 5


def test_dry_run_prints_what_writes_the_same_script(shell):
    printed = shell.dry(*JOB, *RUN)
    path, call = submit(shell, *JOB, *RUN)
    written = Path(path).read_text()
    Path(path).unlink()
    assert shell.bash(printed) == 0
    assert Path(path).read_text() == written
    assert shell.calls() == [call]


@pytest.mark.parametrize("limit", ["90", "90:00", "24:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_every_form_of_time_limit_is_taken(shell, limit):
    assert f"#SBATCH --time={limit}\n" in shell.dry(*JOB[:-1], limit, *RUN)

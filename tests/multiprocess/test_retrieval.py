"""Embedding and neighbour jobs in real processes: the bytes of one process, whatever their number and who is killed."""

import signal
import time

import numpy as np
import pytest

from cm3jax.parallel.departure import EXIT_CODE

SHARDS = 5
# Of both jobs: shards, settings, manifest.
FILES = 2 * (SHARDS + 2)


@pytest.fixture
def retrieve(launch_program, scene_records):
    """Starts both jobs with `out` as their directory; `launch_program`'s options."""

    def start(out, **how):
        paths = (scene_records / "train", scene_records / "text.model", out)
        return launch_program("neighbours.py", *map(str, paths), **how)

    return start


@pytest.fixture
def whole(retrieve, tmp_path):
    """What one process writes that is never killed."""
    retrieve(tmp_path / "whole").finished()
    found = contents(tmp_path / "whole")
    assert len(found) == FILES
    return found


def contents(folder):
    """Bytes of the files that have their names; a killed process leaves parts under hidden ones."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for_files(job, out, count, timeout=120):
    deadline = time.monotonic() + timeout
    while len(contents(out)) < count:
        assert time.monotonic() < deadline, f"no {count} files in {timeout} s: {job.output(0)[-3000:]}"
        time.sleep(0.001)


def check_killed(retrieve, whole, out, rng, kills):
    """Each time other numbers of processes, all killed when a random number of files is there."""
    for least in np.sort(rng.choice(np.arange(1, FILES), kills, replace=False)):
        job = retrieve(out, processes=int(rng.integers(1, 4)))
        wait_for_files(job, out, least)
        job.kill()
        job.wait()
    retrieve(out, processes=2).finished()
    assert contents(out) == whole


def test_two_processes_write_the_bytes_of_one_and_go_on_after_a_kill(retrieve, whole, tmp_path):
    check_killed(retrieve, whole, tmp_path / "parts", np.random.default_rng(0), kills=1)


@pytest.mark.slow
def test_killed_at_ten_random_moments(retrieve, whole, tmp_path):
    check_killed(retrieve, whole, tmp_path / "parts", np.random.default_rng(1), kills=10)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_the_same_command_goes_on(retrieve, whole, tmp_path, victim):
    out = tmp_path / "parts"
    job = retrieve(out, processes=2, CM3_HEARTBEAT_SECONDS="10")
    wait_for_files(job, out, 2)
    job.processes[victim].send_signal(signal.SIGKILL)
    status = job.wait(timeout=60)
    assert status[victim] == -signal.SIGKILL and status[1 - victim] == EXIT_CODE, job.output(1 - victim)[-3000:]
    retrieve(out, processes=2).finished()
    assert contents(out) == whole

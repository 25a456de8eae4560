"""Several real processes as one run: same losses, one stop, and an end when one of them is gone."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cm3jax.metrics import read_metrics
from cm3jax.parallel.departure import EXIT_CODE, ROLL_CALL_SECONDS

HEARTBEAT = "10"


def losses(workdir):
    return read_metrics(workdir / "metrics.jsonl")["loss"]


def wait_for_step(workdir, step, timeout=120):
    deadline = time.monotonic() + timeout
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {timeout} s")


@pytest.fixture
def one_process(launch, job_config, tmp_path):
    launch(tmp_path / "one", job_config, devices=4).finished()
    return tmp_path / "one"


def test_the_number_of_processes_does_not_change_the_losses(launch, job_config, one_process, tmp_path):
    for processes in (2, 4):
        workdir = tmp_path / f"of-{processes}"
        job = launch(workdir, job_config, processes=processes, devices=4 // processes).finished()
        np.testing.assert_allclose(losses(workdir)[1], losses(one_process)[1], rtol=1e-6)
        assert not any("Traceback" in job.output(i) for i in range(processes))
        # One process writes for all.
        assert len(losses(workdir)[0]) == 30
        assert sorted(p.name for p in workdir.iterdir()) == sorted(p.name for p in one_process.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_of_four_stops_all_at_one_step_and_the_rest_is_exact(
    launch, job_config, tmp_path, number, digest
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    longer = "--config.run.steps=80"
    launch(whole, job_config, longer, processes=4).finished()
    job = launch(parts, job_config, longer, processes=4)
    wait_for_step(parts, 12)
    job.processes[2].send_signal(number)
    job.finished()
    stops = {re.search(r"stopped by a signal after step (\d+)", job.output(i)).group(1) for i in range(4)}
    assert len(stops) == 1 and 12 <= int(stops.pop()) < 80
    launch(parts, job_config, longer, processes=4).finished()
    assert digest(parts) == digest(whole)
    np.testing.assert_array_equal(losses(parts)[1], losses(whole)[1])


@pytest.mark.parametrize("victim", [2, 0])
def test_when_one_is_killed_the_others_end_in_time_and_name_it(launch, job_config, tmp_path, victim):
    workdir = tmp_path / "run"
    job = launch(workdir, job_config, "--config.run.steps=100000", processes=4, CM3_HEARTBEAT_SECONDS=HEARTBEAT)
    wait_for_step(workdir, 10)
    start = time.monotonic()
    job.processes[victim].send_signal(signal.SIGKILL)
    status = job.wait(timeout=60)
    assert time.monotonic() - start < int(HEARTBEAT) + ROLL_CALL_SECONDS + 10
    name = rf"process {victim} \({re.escape(os.uname().nodename)}, pid {job.processes[victim].pid}\)"
    for i in set(range(4)) - {victim}:
        assert status[i] == EXIT_CODE, job.output(i)[-3000:]
        assert re.search(name, job.output(i)), job.output(i)[-3000:]


def test_a_process_that_never_comes_is_named(environment, free_port):
    program = """
import sys, time, jax
from cm3jax.parallel.distributed import BarrierError, DistributedConfig, barrier, initialize
process = int(sys.argv[2])
initialize(DistributedConfig(sys.argv[1], 2, process, connect_seconds=60, heartbeat_seconds=60))
if process == 1:
    time.sleep(12)
else:
    start = time.monotonic()
    try:
        barrier("the end of the test", seconds=3)
    except BarrierError as error:
        print(f"{time.monotonic() - start:.0f} s: {error}", flush=True)
import os; os._exit(0)
"""
    address = f"127.0.0.1:{free_port}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(i)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    output = processes[0].communicate(timeout=60)[0]
    processes[1].kill()
    assert re.search(r"^[34] s: waited 3 s at 'the end of the test' for process 1 \(.*, pid \d+\)$", output, re.M)

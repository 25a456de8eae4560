"""Real processes on one machine, joined as a launcher would join them."""

import dataclasses
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cm3jax.reliability.checkpoint import load_params


@pytest.fixture
def free_port() -> int:
    """Of this machine, at this moment."""
    return _free_port()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass
class Job:
    """The processes of one program, and what each of them writes."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit statuses; what still runs after `timeout` seconds is killed, which fails the test."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)

    def output(self, index: int) -> str:
        return self.logs[index].read_text()

    def finished(self) -> "Job":
        """This job, which must end well."""
        status = self.wait()
        assert status == [0] * len(status), "\n".join(self.output(i)[-3000:] for i in range(len(status)))
        return self


@pytest.fixture
def job_config(scene_records) -> str:
    """The option that names the configuration of the test job."""
    return f"--config=tests/jobs/lm.py:{scene_records}"


@pytest.fixture
def digest():
    """Function from a run directory to (step, SHA-256 of the weights) of its newest checkpoint."""

    def digest(workdir: Path) -> tuple[int, str]:
        step, params = load_params(workdir / "checkpoints")
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            found.update(np.asarray(leaf).tobytes())
        return step, found.hexdigest()

    return digest


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a training process: no virtual devices of the test session; compiled programs are kept between processes."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled-jobs"
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def launch_program(environment, repo_root, tmp_path):
    """Starts `processes` processes of a program in tests/jobs with `devices` virtual devices each."""
    started: list[Job] = []

    def start(program: str, *arguments: str, processes: int = 1, devices: int = 1, **variables: str) -> Job:
        # Threads as in tests/conftest.py: enough for the collectives that all devices of a process may be in at once.
        threads = {"PJRT_NPROC": str(16 * devices)}
        shared = environment | {"JAX_NUM_CPU_DEVICES": str(devices)} | threads | variables
        if processes > 1:
            shared |= {"CM3_PROCESSES": str(processes), "CM3_COORDINATOR": f"127.0.0.1:{_free_port()}"}
        command = [sys.executable, str(repo_root / "tests" / "jobs" / program), *arguments]
        logs = [tmp_path / f"job-{len(started)}-{i}.log" for i in range(processes)]
        children = [
            subprocess.Popen(
                command,
                env=shared | {"CM3_PROCESS": str(i)},
                cwd=repo_root,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(logs)
        ]
        started.append(Job(children, logs))
        return started[-1]

    yield start
    for job in started:
        job.kill()


@pytest.fixture
def launch(launch_program):
    """Starts processes of the training program; otherwise as `launch_program`."""

    def start(workdir: Path, *options: str, **how) -> Job:
        return launch_program("train.py", f"--workdir={workdir}", *options, **how)

    return start

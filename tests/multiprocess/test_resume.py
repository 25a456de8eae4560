"""Runs that are killed at any moment, and runs that go on elsewhere, end as if nothing had happened."""

import json
import signal
import time

import numpy as np
import pytest

from cm3jax.metrics import read_metrics
from cm3jax.reliability.goodput import account, read_spans

STEPS = 60
SAVES = "--config.run.checkpoint.every=4"


def losses(workdir):
    return read_metrics(workdir / "metrics.jsonl")["loss"]


def saving(workdir):
    """A checkpoint is being written at this moment."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def kill_at_random(job, workdir, rng, longest, while_saving):
    """SIGKILL after a random time, or in the middle of the next write of a checkpoint."""
    deadline = time.monotonic() + rng.uniform(0, longest / 2 if while_saving else longest)
    while job.processes[0].poll() is None:
        if time.monotonic() > deadline and (saving(workdir) or not while_saving):
            job.processes[0].send_signal(signal.SIGKILL)
        time.sleep(0.002)
    (status,) = job.wait()
    assert status in (0, -signal.SIGKILL), job.output(0)[-3000:]
    return status != 0


def check_killed(launch, config, digest, tmp_path, kills):
    options = (config, f"--config.run.steps={STEPS}", SAVES)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start = time.monotonic()
    launch(whole, *options, devices=2).finished()
    longest = time.monotonic() - start
    rng = np.random.default_rng(0)
    happened = finished = 0
    while happened < kills:
        job = launch(parts, *options, devices=2)
        if kill_at_random(job, parts, rng, longest, while_saving=happened % 2 == 1):
            happened += 1
        else:
            # It came to its end before the moment of its death: begin again, so that all kills count.
            finished += 1
            assert digest(parts) == digest(whole)
            parts = tmp_path / f"parts-{finished}"
    launch(parts, *options, devices=2).finished()
    assert digest(parts) == digest(whole)
    np.testing.assert_array_equal(losses(parts)[1], losses(whole)[1])
    spans = read_spans(parts / "goodput.jsonl")
    totals = account(spans)
    assert sum(totals.values()) == pytest.approx(spans[-1].end - spans[0].start, rel=1e-3)


def test_killed_at_twenty_random_moments(launch, job_config, digest, tmp_path):
    check_killed(launch, job_config, digest, tmp_path, kills=20)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(launch, job_config, digest, tmp_path):
    check_killed(launch, job_config, digest, tmp_path, kills=50)


def samples(path, first, last):
    """What the sequences first .. last - 1 were made of, by index; read more than once, they were the same."""
    found = {}
    for line in path.read_text().splitlines():
        index, pieces = json.loads(line)
        assert found.setdefault(index, pieces) == pieces
    return [found[index] for index in range(first, last)]


@pytest.mark.parametrize(
    "machines",
    [[(1, 8), (1, 4), (1, 2), (1, 1), (1, 8)], [(1, 4), (2, 2), (4, 1), (1, 4)]],
    ids=["devices", "processes"],
)
def test_a_run_goes_on_on_other_machines(launch, job_config, tmp_path, machines):
    """Each part of the run has another number of devices or processes."""
    every = 10
    steps = every * len(machines)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(whole, job_config, f"--config.run.steps={steps}", devices=8, CM3_SAMPLES=str(tmp_path / "all")).finished()
    for i, (processes, devices) in enumerate(machines):
        log = tmp_path / f"part-{i}"
        job = launch(
            parts,
            job_config,
            f"--config.run.steps={every * (i + 1)}",
            processes=processes,
            devices=devices,
            CM3_SAMPLES=str(log),
        ).finished()
        assert i == 0 or f"resuming from step {every * i}" in job.output(0)
        first, last = 8 * every * i, 8 * every * (i + 1)
        assert samples(log, first, last) == samples(tmp_path / "all", first, last)
    np.testing.assert_allclose(losses(parts)[1], losses(whole)[1], rtol=1e-6)
    np.testing.assert_array_equal(losses(parts)[0], np.arange(1, steps + 1))

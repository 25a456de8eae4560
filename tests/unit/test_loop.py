import dataclasses
import json
import logging
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cm3jax import loop
from cm3jax.loop import ReliabilityConfig, RunConfig
from cm3jax.metrics import read_metrics
from cm3jax.optim import apply_updates, opt_state_specs
from cm3jax.reliability.anomaly import AnomalyConfig, AnomalyError, fresh_guard, guard_specs, guarded
from cm3jax.reliability.checkpoint import CheckpointConfig, CheckpointError
from cm3jax.reliability.divergence import DivergenceError
from cm3jax.reliability.goodput import account, read_spans
from cm3jax.state import TrainState, fresh_state

SGD = optax.adam(1e-2)
ANOMALY = AnomalyConfig()


class Rows:
    """Row i is drawn from (seed, i)."""

    def __getitem__(self, index):
        x = np.random.default_rng((7, index)).normal(size=4).astype(np.float32)
        return {"x": x, "y": x.sum(keepdims=True)}


@dataclasses.dataclass
class LineTask:
    """Least squares on random rows; `on_step` is called on the host before batches are consumed."""

    fingerprint: str = "rows"
    examples: Rows = dataclasses.field(default_factory=Rows)
    batch_size: int = 8
    unit: str = "rows"
    units_per_batch: int = 8
    flops_per_batch: float = 1.0
    evaluations: list = dataclasses.field(default_factory=list)

    def init(self, key):
        params = {"w": jax.random.normal(key, (4, 1))}
        return fresh_state(params, SGD.init(params), fresh_guard(ANOMALY))

    def state_specs(self):
        params = {"w": P()}
        moments = opt_state_specs(SGD, {"w": jnp.zeros((4, 1))}, params)
        return TrainState(P(), params, moments, {}, guard_specs())

    def batch_shapes(self):
        sizes = {"x": 4, "y": 1}
        return {name: jax.ShapeDtypeStruct((self.batch_size, size), jnp.float32) for name, size in sizes.items()}

    def step(self, state, batch):
        def loss(params):
            return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        updated, norm = apply_updates(SGD, state, grads)
        state, metrics = guarded(ANOMALY, state, updated, value, norm)
        return state, {"loss": value} | metrics

    def data_fingerprint(self):
        return self.fingerprint

    def evaluate(self, state):
        self.evaluations.append(int(state.step))
        return {"norm": float(jnp.linalg.norm(state.params["w"]))}


def config(steps, **changes):
    return RunConfig(**{"steps": steps, "log_every": 1, "checkpoint": CheckpointConfig(every=5)} | changes)


def run(task, config, workdir):
    return loop.run(task, config, workdir, seed=3, fingerprint="f")


def losses(workdir):
    return read_metrics(workdir / "metrics.jsonl")["loss"]


def test_logs_every_step_evaluates_and_reports_throughput(tmp_path):
    task = LineTask()
    state = run(task, config(12, eval_every=4), tmp_path)
    assert int(state.step) == 12
    assert task.evaluations == [4, 8, 12]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(metrics["loss"][0], np.arange(1, 13))
    np.testing.assert_array_equal(metrics["eval/norm"][0], [4, 8, 12])
    assert {"rows_per_second", "mfu", "data_wait_share", "grad_norm", "skipped"} <= set(metrics)


def test_same_seed_gives_the_same_losses(tmp_path):
    run(LineTask(), config(8), tmp_path / "a")
    run(LineTask(), config(8), tmp_path / "b")
    np.testing.assert_array_equal(losses(tmp_path / "a")[1], losses(tmp_path / "b")[1])


def test_continuing_equals_never_stopping(tmp_path):
    whole = run(LineTask(), config(12), tmp_path / "whole")
    run(LineTask(), config(7), tmp_path / "parts")
    parts = run(LineTask(), config(12), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    np.testing.assert_array_equal(losses(tmp_path / "whole")[1], losses(tmp_path / "parts")[1])


class TerminatingRows(Rows):
    """Sends SIGTERM to this process when example `at` is read."""

    def __init__(self, at):
        self.at = at

    def __getitem__(self, index):
        if index == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_sigterm_saves_stops_and_resumes_exactly(tmp_path, caplog):
    whole = run(LineTask(), config(30), tmp_path / "whole")
    stopped = run(LineTask(examples=TerminatingRows(8 * 12)), config(30), tmp_path / "parts")
    assert int(stopped.step) < 30
    assert "stopped by a signal" in caplog.text
    resumed = run(LineTask(), config(30), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    np.testing.assert_array_equal(losses(tmp_path / "whole")[1], losses(tmp_path / "parts")[1])


def test_a_finished_run_does_nothing_and_evaluates_only_if_that_is_missing(tmp_path):
    first = run(LineTask(), config(6), tmp_path)
    task = LineTask()
    again = run(task, config(6), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert task.evaluations == []
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("".join(f"{x}\n" for x in lines if "eval/norm" not in json.loads(x)))
    run(task, config(6), tmp_path)
    assert task.evaluations == [6]


def test_other_data_is_refused(tmp_path):
    run(LineTask(), config(6), tmp_path)
    with pytest.raises(CheckpointError, match="was trained on data rows, this run has lines"):
        run(LineTask(fingerprint="lines"), config(9), tmp_path)


def test_training_time_is_carried_over(tmp_path):
    run(LineTask(), config(6), tmp_path)
    note = json.loads(json.dumps(loop.Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).note(6)))
    assert note["seconds"] > 0
    assert note["data"] == "rows"


def test_nothing_is_logged_twice_after_a_kill_between_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(LineTask(), config(7), tmp_path)
    checkpoints = loop.Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints._manager.delete(7)
    checkpoints.close()
    run(LineTask(), config(12), tmp_path)
    assert "resuming from step 5" in caplog.text
    np.testing.assert_array_equal(losses(tmp_path)[0], np.arange(1, 13))


class BrokenRows(Rows):
    """Rows `first` ... `last` - 1 are NaN."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return row | {"x": row["x"] * np.nan} if self.first <= index < self.last else row


def test_broken_batches_are_skipped_and_a_resumed_run_skips_the_same(tmp_path):
    rows = BrokenRows(8 * 4, 8 * 7)
    whole = run(LineTask(examples=rows), config(12), tmp_path / "whole")
    assert int(whole.guard["skipped"]) == 3 and np.isfinite(whole.params["w"]).all()
    metrics = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    np.testing.assert_array_equal(metrics["skipped_in_a_row"][1], [0] * 4 + [1, 2, 3] + [0] * 5)
    run(LineTask(examples=rows), config(5), tmp_path / "parts")
    parts = run(LineTask(examples=rows), config(12), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_too_many_skipped_updates_in_a_row_end_the_run_and_keep_what_was_saved(tmp_path):
    task = LineTask(examples=BrokenRows(8 * 6, 10**6))
    bounds = ReliabilityConfig(abort_after_skipped=4)
    with pytest.raises(AnomalyError, match="4 updates in a row were skipped, up to step 10"):
        run(task, config(100, reliability=bounds), tmp_path)
    assert int(run(LineTask(), config(5), tmp_path).step) == 5


def test_replicas_that_differ_end_the_run(tmp_path, monkeypatch):
    """After update 5 one device computes with another weight than the others."""

    class Fault(loop.DivergenceCheck):
        def __call__(self, state):
            held = [(np.array(s.data), s.device) for s in state.params["w"].addressable_shards]
            held[3][0][2, 0] += 1e-6
            parts = [jax.device_put(part, device) for part, device in held]
            w = jax.make_array_from_single_device_arrays((4, 1), state.params["w"].sharding, parts)
            super().__call__(state.replace(params={"w": w}))

    bounds = ReliabilityConfig(check_replicas_every=5)
    assert int(run(LineTask(), config(10, reliability=bounds), tmp_path / "sound").step) == 10
    monkeypatch.setattr(loop, "DivergenceCheck", Fault)
    with pytest.raises(DivergenceError, match=r"params/w\[, \] on device 3 \(process 0\)"):
        run(LineTask(), config(10, reliability=bounds), tmp_path / "broken")


def test_the_clock_asks_for_saves(tmp_path):
    checkpoint = CheckpointConfig(every=1000, every_minutes=1e-9, keep=100)
    run(LineTask(), config(6, checkpoint=checkpoint), tmp_path)
    # The flag of an update is read one update late, so the first one is not saved.
    assert loop.Checkpoints(tmp_path / "checkpoints", checkpoint).steps() == [2, 3, 4, 5, 6]


def test_the_best_evaluation_keeps_its_checkpoint(tmp_path):
    checkpoint = CheckpointConfig(every=2, keep=1, best=1, best_metric="norm", best_mode="max")
    run(LineTask(), config(12, checkpoint=checkpoint, eval_every=2), tmp_path)
    values = read_metrics(tmp_path / "metrics.jsonl")["eval/norm"]
    best = int(values[0][np.argmax(values[1])])
    assert loop.Checkpoints(tmp_path / "checkpoints", checkpoint).steps() == sorted({best, 12})


def test_every_second_of_a_run_is_booked(tmp_path):
    start = time.time()
    run(LineTask(), config(7), tmp_path)
    run(LineTask(), config(12, eval_every=3), tmp_path)
    spent = time.time() - start
    totals = account(read_spans(tmp_path / "goodput.jsonl"))
    assert sum(totals.values()) == pytest.approx(spent, rel=0.02)
    assert min(totals[bucket] for bucket in ("init", "compile", "data_wait", "step", "save_stall", "eval")) > 0


def test_the_layout_is_written_down(tmp_path):
    run(LineTask(), config(1), tmp_path)
    assert "params/w" in (tmp_path / "layout.txt").read_text()

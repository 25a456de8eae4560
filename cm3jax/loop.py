"""The training loop, one for every task: restore or init, step, log, evaluate, save, leave when told.

The order inside `run` matters: metrics are read from the device one update late, so the host never waits for the step
it has just dispatched; a checkpoint of step n is written before batch n is consumed, so the data position is n itself.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cm3jax.data.loader import LoaderConfig, batches, prefetch_to_device, process_slot
from cm3jax.metrics import MetricsWriter
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding, shardings
from cm3jax.perf.peak import peak_flops
from cm3jax.reliability.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from cm3jax.reliability.preemption import StopRequest
from cm3jax.state import TrainState
from cm3jax.tasks.task import Task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long to train and how often to look.

    `eval_every` 0 evaluates only after the last update.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    mesh: MeshConfig = MeshConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


@dataclasses.dataclass
class Clock:
    """What a run has used so far; saved with every checkpoint."""

    seconds: float = 0.0


def run(task: Task, config: RunConfig, workdir: Path, *, seed: int, fingerprint: str) -> TrainState:
    """Trains `task` up to `config.steps` updates in `workdir`, resuming what is there.

    Args:
      fingerprint: of the resolved configuration; stored in every checkpoint.

    Returns:
      The state after the last update, or the saved state if a signal asked the run to stop.

    Raises:
      CheckpointError: the run in `workdir` was made with other data, or none of its checkpoints can be read.
    """
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), StopRequest() as stop:
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        state, clock = _restore_or_init(task, mesh, checkpoints, seed)
        start = int(state.step)
        with MetricsWriter(workdir / "metrics.jsonl", resume_step=start) as writer:
            trainer = _Trainer(task, config, checkpoints, writer, clock, fingerprint)
            state = trainer.train(state, start, mesh, stop)
        checkpoints.close()
    return state


def evaluate_untrained(task: Task, config: RunConfig, seed: int) -> dict[str, float]:
    """What `task.evaluate` says of the state that training starts from."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return task.evaluate(_init(task, shardings(mesh, task.state_specs()), seed))


def _init(task: Task, layout: Any, seed: int) -> TrainState:
    # Runs once, and on a CPU the last optimisations of a hundred random draws take minutes to compile.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(task.init, out_shardings=layout, compiler_options=options)(jax.random.key(seed))


def _restore_or_init(
    task: Task, mesh: jax.sharding.Mesh, checkpoints: Checkpoints, seed: int
) -> tuple[TrainState, Clock]:
    layout = shardings(mesh, task.state_specs())
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        jax.eval_shape(task.init, jax.random.key(seed)),
        layout,
    )
    restored = checkpoints.restore_newest(abstract)
    if restored is None:
        return _init(task, layout, seed), Clock()
    step, state = restored
    note = checkpoints.note(step)
    if note["data"] != task.data_fingerprint():
        raise CheckpointError(
            f"{checkpoints.directory}: step {step} was trained on data {note['data']}, this run has "
            f"{task.data_fingerprint()}; batches after a resume would differ. Use another --workdir"
        )
    logger.info("resuming from step %d of %s", step, checkpoints.directory)
    return state, Clock(note["seconds"])


class _Trainer:
    """The moving parts of one call of `run`."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        clock: Clock,
        fingerprint: str,
    ):
        self.task, self.config, self.checkpoints, self.writer = task, config, checkpoints, writer
        self.clock, self.fingerprint = clock, fingerprint
        self.saved_step = -1

    def train(self, state: TrainState, start: int, mesh: jax.sharding.Mesh, stop: StopRequest) -> TrainState:
        config, task = self.config, self.task
        if start >= config.steps:
            self._finish(start, state)
            return state
        layout = jax.tree.map(lambda a: a.sharding, state)
        update = jax.jit(task.step, donate_argnums=0, out_shardings=(layout, None))
        rows = batch_sharding(mesh)
        slot = process_slot(rows, task.batch_size)
        stream = prefetch_to_device(
            batches(task.examples, task.batch_size, start, config.steps - start, *slot, config.loader), rows
        )
        pending: tuple[int, dict[str, jax.Array]] | None = None
        meter = _Throughput(task, mesh.size)
        with _progress(start, config.steps) as advance:
            for step in range(start, config.steps):
                batch = meter.wait_for(stream)
                state, metrics = update(state, batch)
                if pending:
                    advance(self._log(*pending, meter))
                pending = (step + 1, metrics) if self._is_log_step(step + 1, start) else None
                done = step + 1
                if stop.requested and done < config.steps:
                    self._save(done, state)
                    logger.warning("stopped by a signal after step %d; the same command continues", done)
                    break
                if done % config.checkpoint.every == 0 and done < config.steps:
                    self._save(done, state)
                if config.eval_every and done % config.eval_every == 0 and done < config.steps:
                    with meter.paused():
                        self._evaluate(done, state)
            if pending:
                advance(self._log(*pending, meter))
        if done == config.steps:
            self._save(done, state)
            self._finish(done, state)
        return state

    def _finish(self, step: int, state: TrainState) -> None:
        """The last evaluation, also for a run that was killed between its last save and that evaluation."""
        evaluated = any(name.startswith("eval/") and step in steps for name, (steps, _) in self.writer.read().items())
        if not evaluated:
            self._evaluate(step, state)

    def _is_log_step(self, step: int, start: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps or step == start + 1

    def _log(self, step: int, metrics: dict[str, jax.Array], meter: "_Throughput") -> tuple[int, dict[str, float]]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values |= meter.read(step)
        self.clock.seconds += values.pop("seconds")
        self.writer.write(step, values)
        return step, values

    def _evaluate(self, step: int, state: TrainState) -> None:
        values = {f"eval/{name}": value for name, value in self.task.evaluate(state).items()}
        self.writer.write(step, values)
        logger.info("step %d: %s", step, json.dumps({k: round(v, 4) for k, v in values.items()}))

    def _save(self, step: int, state: TrainState) -> None:
        note = {"config": self.fingerprint, "data": self.task.data_fingerprint(), "seconds": self.clock.seconds}
        self.checkpoints.save(step, state, note)


class _Throughput:
    """Units per second, share of the device's peak, and time spent waiting for data, between two log lines."""

    def __init__(self, task: Task, devices: int):
        self.task = task
        self.peak = peak_flops(jax.devices()[0]) * devices
        self.waited = 0.0
        self.last: tuple[int, float] | None = None

    def wait_for(self, stream: Iterator[Any]) -> Any:
        start = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - start
        return batch

    def paused(self) -> "_Pause":
        return _Pause(self)

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last call; the first call, which holds the compilation, has none."""
        now, last = time.perf_counter(), self.last
        self.last, waited, self.waited = (step, now), self.waited, 0.0
        if last is None:
            return {"seconds": 0.0}
        seconds, updates = now - last[1], step - last[0]
        return {
            "seconds": seconds,
            f"{self.task.unit}_per_second": updates * self.task.units_per_batch / seconds,
            "mfu": updates * self.task.flops_per_batch / seconds / self.peak,
            "data_wait_share": waited / seconds,
        }


class _Pause:
    """Takes the time spent inside out of the throughput."""

    def __init__(self, meter: _Throughput):
        self.meter = meter

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self.meter.last is not None:
            step, then = self.meter.last
            self.meter.last = (step, then + time.perf_counter() - self.start)


@contextlib.contextmanager
def _progress(start: int, steps: int) -> Iterator[Any]:
    """A progress bar; yields a function that takes (step, metrics)."""
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns) as bar:
        row = bar.add_task("train", total=steps, completed=start, line="compiling")

        def advance(logged: tuple[int, dict[str, float]]) -> None:
            step, values = logged
            bar.update(row, completed=step, line="  ".join(f"{name} {value:.4g}" for name, value in values.items()))

        yield advance

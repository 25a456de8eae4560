"""The training loop, one for every task: restore or init, step, log, evaluate, save, leave when told.

The order inside `_Trainer.train` matters: metrics and flags are read from the device one update late, so the host never
waits for the update it has just dispatched; a checkpoint of step n is written before batch n is consumed, so the data
position is n itself.
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

from cm3jax.data.loader import LoaderConfig, device_batches
from cm3jax.files import write_atomic
from cm3jax.metrics import MetricsWriter
from cm3jax.parallel.agreement import Flags
from cm3jax.parallel.distributed import barrier, first_process
from cm3jax.parallel.layout import layout_text
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding
from cm3jax.perf.hardware import peak_flops
from cm3jax.perf.profile import Profile
from cm3jax.reliability.anomaly import AnomalyError
from cm3jax.reliability.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from cm3jax.reliability.divergence import DivergenceCheck
from cm3jax.reliability.goodput import Ledger
from cm3jax.reliability.heap import return_freed_memory
from cm3jax.reliability.preemption import StopRequest
from cm3jax.reliability.watchdog import Watchdog
from cm3jax.state import TrainState
from cm3jax.tasks.task import Task
from cm3jax.tasks.update import FLAGS, abstract_state, lower_update

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReliabilityConfig:
    """Bounds of a run that is not watched by a person.

    Attributes:
      startup_seconds: for opening the data, restoring and compiling; then the process ends itself.
      hang_seconds: for one update, save or evaluation.
      abort_after_skipped: skipped updates in a row that end the run.
      check_replicas_every: updates between comparisons of what replicas hold; 0 never compares.
    """

    startup_seconds: float = 3600.0
    hang_seconds: float = 1800.0
    abort_after_skipped: int = 50
    check_replicas_every: int = 1000


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long to train and how often to look.

    Attributes:
      eval_every: updates between evaluations; 0 evaluates only after the last update.
      profile_updates: how many updates to trace, soon after the start.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    profile_updates: int = 0
    mesh: MeshConfig = MeshConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()


def run(task: Task, config: RunConfig, workdir: Path, *, seed: int, fingerprint: str) -> TrainState:
    """Trains `task` up to `config.steps` updates in `workdir`, resuming what is there.

    Args:
      fingerprint: of the resolved configuration; stored in every checkpoint.

    Returns:
      The state after the last update, or the saved state if a signal asked the run to stop.

    Raises:
      CheckpointError: the run in `workdir` was made with other data, or none of its checkpoints can be read.
      AnomalyError: too many updates in a row were skipped.
      DivergenceError: replicas of the state differ.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    first = jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    with (
        Ledger(workdir / "goodput.jsonl" if first else None) as ledger,
        Watchdog(workdir / f"stacks-{jax.process_index()}.txt") as watchdog,
        StopRequest() as stop,
        jax.set_mesh(mesh),
    ):
        watchdog.expect("open the data and the checkpoints", config.reliability.startup_seconds)
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        state, seconds = _restore_or_init(task, mesh, checkpoints, seed)
        start = int(state.step)
        ledger.begin_at(start)
        with MetricsWriter(workdir / "metrics.jsonl" if first else None, resume_step=start) as writer:
            trainer = _Trainer(task, config, workdir, checkpoints, writer, ledger, watchdog, stop)
            trainer.note = {"config": fingerprint, "data": task.data_fingerprint(), "seed": seed}
            trainer.seconds = seconds
            state = trainer.train(state, mesh)
        with ledger.within("save_stall"):
            checkpoints.close()
        barrier("the end of the run")
    return state


def evaluate(task: Task, config: RunConfig, state: TrainState) -> dict[str, float]:
    """What `task.evaluate` says of a state that `run` returned, perhaps of a task with other data."""
    with jax.set_mesh(make_mesh(config.mesh)):
        return task.evaluate(state)


def evaluate_untrained(task: Task, config: RunConfig, seed: int) -> dict[str, float]:
    """What `task.evaluate` says of the state that training starts from."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return task.evaluate(_init(task, abstract_state(task, mesh), seed))


def _init(task: Task, abstract: TrainState, seed: int) -> TrainState:
    # Runs once, and on a CPU the last optimisations of a hundred random draws take minutes to compile.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    layout = jax.tree.map(lambda a: a.sharding, abstract)
    return jax.jit(task.init, out_shardings=layout, compiler_options=options)(jax.random.key(seed))


def _restore_or_init(
    task: Task, mesh: jax.sharding.Mesh, checkpoints: Checkpoints, seed: int
) -> tuple[TrainState, float]:
    """The state to go on from, and the seconds of training that are in it."""
    abstract = abstract_state(task, mesh)
    restored = checkpoints.restore_newest(abstract)
    if restored is None:
        return _init(task, abstract, seed), 0.0
    step, state = restored
    note = checkpoints.note(step)
    if note["data"] != task.data_fingerprint():
        raise CheckpointError(
            f"{checkpoints.directory}: step {step} was trained on data {note['data']}, this run has "
            f"{task.data_fingerprint()}; batches after a resume would differ. Use another --workdir"
        )
    logger.info("resuming from step %d of %s", step, checkpoints.directory)
    return state, note["seconds"]


@dataclasses.dataclass
class _Pending:
    """An update that is on its way: what it will say."""

    step: int
    metrics: dict[str, jax.Array]
    flags: jax.Array


class _Trainer:
    """The moving parts of one call of `run`.

    Attributes:
      note: what is stored with every checkpoint.
      seconds: of training so far, over all attempts.
    """

    note: dict[str, Any]
    seconds: float

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        workdir: Path,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        ledger: Ledger,
        watchdog: Watchdog,
        stop: StopRequest,
    ):
        self.task, self.config, self.workdir, self.checkpoints = task, config, workdir, checkpoints
        self.writer, self.ledger, self.watchdog, self.stop = writer, ledger, watchdog, stop

    def train(self, state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
        config, start = self.config, int(state.step)
        if start >= config.steps:
            self._evaluate_if_missing(start, state)
            return state
        update = self._compile(state, mesh)
        flags, check = Flags(mesh, FLAGS), DivergenceCheck(mesh, state)
        profile = Profile(self.workdir / "profile", config.profile_updates)
        stream = device_batches(
            self.task.examples, self.task.batch_size, start, config.steps - start, batch_sharding(mesh), config.loader
        )
        meter, due = _Throughput(self.task, mesh.size, self.ledger), _Due(config.checkpoint)
        # The collectives of two updates that are under way at once can take each other's threads of a CPU, for ever.
        one_at_a_time = jax.default_backend() == "cpu" and mesh.size > 1
        pending: _Pending | None = None
        with _progress(start, config.steps) as advance:
            for done in range(start + 1, config.steps + 1):
                self._expect(f"update {done}")
                self.ledger.enter("data_wait")
                batch = next(stream)
                self.ledger.enter("step")
                profile.before_update()
                state, metrics, agreed = update(state, batch, flags.raised([self.stop.requested, due.by_clock()]))
                if one_at_a_time:
                    jax.block_until_ready(agreed)
                leave, save = self._settle(pending, meter, advance)
                pending = _Pending(done, metrics, agreed)
                profile.after_update(metrics)
                every = config.reliability.check_replicas_every
                if every and done % every == 0:
                    check(state)
                if done == config.steps:
                    break
                evaluation = None
                if config.eval_every and done % config.eval_every == 0:
                    evaluation = self._evaluate(done, state)
                if leave or save or done % config.checkpoint.every == 0:
                    self._save(done, state, evaluation)
                    due.saved()
                if leave:
                    logger.warning("stopped by a signal after step %d; the same command continues", done)
                    break
            self._settle(pending, meter, advance)
        if done == config.steps:
            self._save(done, state, self._evaluate(done, state))
        return state

    def _compile(self, state: TrainState, mesh: jax.sharding.Mesh) -> Any:
        with self.ledger.within("compile"):
            text = layout_text(mesh, state, jax.tree.map(lambda a: a.sharding.spec, state))
            update = lower_update(self.task, mesh, state).compile()
            return_freed_memory()
        if jax.process_index() == 0:
            write_atomic(self.workdir / "layout.txt", text.encode())
        memory = update.memory_analysis()
        if memory is not None:
            logger.info(
                "memory of the update on a device: %.1f MB arguments, %.1f MB temporaries",
                memory.argument_size_in_bytes / 1e6,
                memory.temp_size_in_bytes / 1e6,
            )
        return update

    def _settle(self, pending: _Pending | None, meter: "_Throughput", advance: Any) -> tuple[bool, bool]:
        """Waits for an update, logs it, and returns the flags (leave, save) that all processes saw beside it."""
        if pending is None:
            return False, False
        found, (leave, save) = jax.device_get((pending.metrics, pending.flags))
        values = {name: float(value) for name, value in found.items()}
        self.ledger.reached(pending.step)
        self.checkpoints.check()
        if values.get("skipped_in_a_row", 0.0) >= self.config.reliability.abort_after_skipped:
            raise AnomalyError(
                f"{values['skipped_in_a_row']:.0f} updates in a row were skipped, up to step {pending.step}: "
                f"loss or gradient not finite or far above its past (gradient norm {values['grad_norm']:g})"
            )
        if self._is_log_step(pending.step):
            values |= meter.read(pending.step)
            self.seconds += values.pop("seconds")
            self.writer.write(pending.step, values)
            advance(pending.step, values)
        return bool(leave), bool(save)

    def _is_log_step(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps or step == 1

    def _evaluate_if_missing(self, step: int, state: TrainState) -> None:
        """The last evaluation, for a run that was killed after its last save."""
        evaluated = any(name.startswith("eval/") and step in steps for name, (steps, _) in self.writer.read().items())
        if not first_process(evaluated):
            self._evaluate(step, state)

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        self._expect(f"evaluation after update {step}")
        with self.ledger.within("eval"):
            found = self.task.evaluate(state)
        values = {f"eval/{name}": value for name, value in found.items()}
        self.writer.write(step, values)
        logger.info("step %d: %s", step, json.dumps({k: round(v, 4) for k, v in values.items()}))
        return found

    def _save(self, step: int, state: TrainState, evaluation: dict[str, float] | None) -> None:
        self._expect(f"checkpoint after update {step}")
        with self.ledger.within("save_stall"):
            self.checkpoints.save(step, state, self.note | {"seconds": self.seconds}, evaluation)
        self.ledger.reached(step, flush=True)

    def _expect(self, doing: str) -> None:
        self.watchdog.expect(doing, self.config.reliability.hang_seconds)


class _Due:
    """Whether the first process's clock asks for a save."""

    def __init__(self, config: CheckpointConfig):
        self._seconds = 60 * config.every_minutes if jax.process_index() == 0 else 0.0
        self.saved()

    def by_clock(self) -> bool:
        return bool(self._seconds) and time.monotonic() - self._last >= self._seconds

    def saved(self) -> None:
        self._last = time.monotonic()


class _Throughput:
    """Units per second, share of the device's peak, and time spent waiting for data, between two log lines."""

    def __init__(self, task: Task, devices: int, ledger: Ledger):
        self.task, self.ledger = task, ledger
        self.peak = peak_flops(jax.devices()[0]) * devices
        self.last: tuple[int, float, float] | None = None

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last call; the first call, which holds the warm-up, has none."""
        stepping, waiting = self.ledger.booked("step"), self.ledger.booked("data_wait")
        last, self.last = self.last, (step, stepping, waiting)
        if last is None:
            return {"seconds": stepping + waiting}
        waited = waiting - last[2]
        seconds, updates = stepping - last[1] + waited, step - last[0]
        return {
            "seconds": seconds,
            f"{self.task.unit}_per_second": updates * self.task.units_per_batch / seconds,
            "mfu": updates * self.task.flops_per_batch / seconds / self.peak,
            "data_wait_share": waited / seconds,
        }


@contextlib.contextmanager
def _progress(start: int, steps: int) -> Iterator[Any]:
    """A progress bar in the first process; yields a function that takes (step, metrics)."""
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, disable=jax.process_index() != 0) as bar:
        row = bar.add_task("train", total=steps, completed=start, line="")

        def advance(step: int, values: dict[str, float]) -> None:
            bar.update(row, completed=step, line="  ".join(f"{name} {value:.4g}" for name, value in values.items()))

        yield advance

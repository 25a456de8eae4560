"""Checkpoints: the one file that knows Orbax.

A checkpoint holds two items, `params` (what inference reads) and `training` (optimizer state, extra state, counters),
and a JSON note: the fingerprints of configuration and data, the clock, and a checksum of every array. Writes are
asynchronous and atomic; an error of a background write is raised at the next update, never dropped.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from cm3jax.parallel.distributed import all_processes, barrier
from cm3jax.reliability.checksum import checksums
from cm3jax.state import TrainState

logger = logging.getLogger(__name__)
_policies = ocp.training.preservation_policies
_save_policies = ocp.training.save_decision_policies


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run; the message names the step and the folder."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: updates between two saves.
      every_minutes: minutes after which to save in any case, by the clock of the first process; 0 does not look at it.
      keep: newest checkpoints kept.
      keep_every: checkpoints of steps divisible by this are kept for ever; 0 for none.
      best: checkpoints kept for ever for the best values of `best_metric`, a name that evaluation gives.
      best_mode: whether low or high values are good.
    """

    every: int = 1000
    every_minutes: float = 0.0
    keep: int = 3
    keep_every: int = 0
    best: int = 0
    best_metric: str = ""
    best_mode: Literal["min", "max"] = "min"

    def __post_init__(self):
        if self.every < 1 or self.keep < 1 or self.every_minutes < 0:
            raise ValueError(f"expected every >= 1, keep >= 1 and every_minutes >= 0, found {self}")
        if self.best and not self.best_metric:
            raise ValueError(f"best is {self.best}, but best_metric is not given")


class Checkpoints:
    """Saves and restores the `TrainState` of one run directory; every process of a run makes the same calls."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = Path(directory).resolve()
        self.config = config
        self._manager = self._open()
        self._pending: Any = None

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),
            preservation_policy=_preservation(self.config),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(saved.step for saved in self._manager.checkpoints)

    def save(
        self, step: int, state: TrainState, note: Mapping[str, Any], evaluation: Mapping[str, float] | None = None
    ) -> None:
        """Starts an asynchronous save; first waits for, and surfaces the error of, the one before.

        Args:
          evaluation: of this very state; what `best_metric` is looked up in.
        """
        self.wait()
        items = _items(state)
        metrics = None
        if self.config.best and evaluation is not None:
            if self.config.best_metric not in evaluation:
                known = ", ".join(sorted(evaluation))
                raise CheckpointError(f"best_metric {self.config.best_metric!r}: evaluation has only {known}")
            metrics = dict(evaluation)
        # Without `force` Orbax silently skips a save whose step is not newer than the newest it knows.
        self._pending = self._manager.save_checkpointables_async(
            step, items, force=True, metrics=metrics, custom_metadata=dict(note) | {"checksums": _checksums(items)}
        )

    def check(self) -> None:
        """Looks, without waiting, at what is being written.

        Raises:
          CheckpointError: the background write failed.
        """
        self._result(timeout=0.0)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
          CheckpointError: the background write failed.
        """
        self._result(timeout=None)

    def _result(self, timeout: float | None) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result(timeout=timeout)
        except Exception as error:
            if timeout is not None and isinstance(error, TimeoutError):
                return
            self._pending = None
            raise CheckpointError(f"saving to {self.directory} failed: {error}") from error
        self._pending = None

    def note(self, step: int) -> dict[str, Any]:
        """The note saved with `step`."""
        return _note(self._manager, step)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, laid out as `abstract` says, on whatever mesh that names.

        Raises:
          CheckpointError: there is no such step, it cannot be read, or it is not what was saved.
        """
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {self.steps()}")
        try:
            items = self._manager.load_checkpointables(step, _items(abstract))
            saved = self.note(step)["checksums"]
        except Exception as error:
            raise CheckpointError(f"checkpoint {step} in {self.directory} cannot be read: {error}") from error
        _verify(items, saved, f"checkpoint {step} in {self.directory}")
        return TrainState(params=items["params"], **items["training"])

    def restore_newest(self, abstract: TrainState) -> tuple[int, TrainState] | None:
        """The newest readable checkpoint, or None if there is none at all.

        A damaged one is reported, passed over, and renamed to `STEP.damaged` when an older one could be read; it is
        damaged if any process finds it so.

        Raises:
          CheckpointError: there are checkpoints and none can be read.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            state, fault = None, None
            try:
                state = self.restore(step, abstract)
            except CheckpointError as error:
                fault = error
            if all_processes(fault is None):
                assert state is not None
                self._set_aside(damaged)
                return step, state
            logger.warning("falling back to an older checkpoint: %s", fault or "another process cannot read this one")
            damaged.append(step)
        if steps:
            raise CheckpointError(f"none of the checkpoints {steps} in {self.directory} can be read")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Takes damaged checkpoints out of the way of those that will be saved at the same steps."""
        if not steps:
            return
        self._manager.close()
        if jax.process_index() == 0:
            for step in steps:
                shutil.rmtree(self.directory / f"{step}.damaged", ignore_errors=True)
                os.replace(self.directory / str(step), self.directory / f"{step}.damaged")
        barrier("damaged checkpoints are set aside")
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _preservation(config: CheckpointConfig) -> Any:
    kept: list[Any] = [_policies.LatestN(config.keep)]
    if config.keep_every:
        kept.append(_policies.EveryNSteps(config.keep_every))
    if config.best:
        kept.append(
            _policies.BestN(
                get_metric_fn=lambda metrics: metrics[config.best_metric],
                # Orbax keeps the last ones of the sorted list.
                reverse=config.best_mode == "min",
                n=config.best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return _policies.AnyPreservationPolicy(kept)


def _items(state: TrainState) -> dict[str, Any]:
    training = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}
    return {"params": state.params, "training": training}


def _note(manager: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    return dict(manager.metadata(step).custom_metadata or {})


def _checksums(items: Any) -> dict[str, int]:
    """Checksum of every array, by its path."""
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(items)]
    return dict(zip(names, np.asarray(checksums(items)).tolist(), strict=True))


def _verify(items: Any, saved: Mapping[str, int], what: str) -> None:
    wrong = [name for name, value in _checksums(items).items() if saved.get(name) != value]
    if wrong:
        raise CheckpointError(f"{what} is damaged: checksums differ from those saved, of {', '.join(wrong[:5])}")


def load_params(directory: Path, item: str = "params", step: int | None = None) -> tuple[int, Any]:
    """Weights of the newest (or the named) checkpoint under `directory`, on the first device.

    Args:
      item: "params", or a key of the task's extra state that holds weights of the same structure ("ema").

    Raises:
      CheckpointError: no checkpoint, not the one that was asked for, or a damaged one.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoints: {directory} does not exist")
    with ocp.training.Checkpointer(directory) as manager:
        steps = sorted(saved.step for saved in manager.checkpoints)
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(f"no checkpoint {'' if step is None else step} in {directory}; there are {steps}")
        step = steps[-1] if step is None else step
        metadata = manager.checkpointables_metadata(step).metadata
        name = "params" if item == "params" else "training"
        device = SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), metadata[name])
        loaded = manager.load_checkpointables(step, {name: abstract})
        saved = _note(manager, step)["checksums"]
    _verify(loaded, saved, f"checkpoint {step} in {directory}")
    if item == "params":
        return step, loaded["params"]
    extra = loaded["training"]["extra"]
    if item not in extra:
        raise CheckpointError(f"checkpoint {step} in {directory} has no extra state {item!r}: {sorted(extra)}")
    return step, extra[item]


def read_run_config(workdir: Path) -> dict[str, Any]:
    """The resolved configuration that `train` wrote to a run directory.

    Raises:
      CheckpointError: `workdir` is not a run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{workdir} is not a run: it has no config.json")
    return json.loads(path.read_text())["config"]

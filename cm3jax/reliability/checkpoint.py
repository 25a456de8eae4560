"""Checkpoints: the one file that knows Orbax.

A checkpoint holds two items, `params` (what inference reads) and `training` (optimizer state, extra state, counters),
and a JSON note: the fingerprints of configuration and data, and the clock. Writes are asynchronous and atomic; an
error of a background write is raised at the next save or at `close`, never dropped.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from cm3jax.state import TrainState

logger = logging.getLogger(__name__)
_policies = ocp.training.preservation_policies
_save_policies = ocp.training.save_decision_policies


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run; the message names the step and the folder."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Every how many updates to save, and how many checkpoints to keep (the newest; each `keep_every` for ever)."""

    every: int = 1000
    keep: int = 3
    keep_every: int = 0


class Checkpoints:
    """Saves and restores the `TrainState` of one run directory."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = Path(directory).resolve()
        preserve: list[Any] = [_policies.LatestN(config.keep)]
        if config.keep_every:
            preserve.append(_policies.EveryNSteps(config.keep_every))
        self._manager = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,
        )
        self._pending: Any = None

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(saved.step for saved in self._manager.checkpoints)

    def save(self, step: int, state: TrainState, note: Mapping[str, Any]) -> None:
        """Starts an asynchronous save; first waits for, and surfaces the error of, the one before."""
        self.wait()
        items = {"params": state.params, "training": _training(state)}
        # Without `force` Orbax silently skips a save whose step is not newer than the newest it knows.
        self._pending = self._manager.save_checkpointables_async(step, items, force=True, custom_metadata=dict(note))

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
          CheckpointError: the background write failed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise CheckpointError(f"saving to {self.directory} failed: {error}") from error

    def note(self, step: int) -> dict[str, Any]:
        """The JSON note saved with `step`."""
        return dict(self._manager.metadata(step).custom_metadata or {})

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, laid out as `abstract` says, on whatever mesh that names.

        Raises:
          CheckpointError: there is no such step, or it cannot be read.
        """
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {self.steps()}")
        try:
            items = self._manager.load_checkpointables(
                step, {"params": abstract.params, "training": _training(abstract)}
            )
        except Exception as error:
            raise CheckpointError(f"checkpoint {step} in {self.directory} cannot be read: {error}") from error
        return TrainState(params=items["params"], **items["training"])

    def restore_newest(self, abstract: TrainState) -> tuple[int, TrainState] | None:
        """The newest readable checkpoint, or None if there is none at all.

        A damaged one is reported and passed over.

        Raises:
          CheckpointError: there are checkpoints and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, self.restore(step, abstract)
            except CheckpointError as error:
                logger.warning("falling back to an older checkpoint: %s", error)
        if steps:
            raise CheckpointError(f"none of the checkpoints {steps} in {self.directory} can be read")
        return None

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _training(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}


def load_params(directory: Path, item: str = "params", step: int | None = None) -> tuple[int, Any]:
    """Weights of the newest (or the named) checkpoint under `directory`, on the first device.

    Args:
      item: "params", or a key of the task's extra state that holds weights of the same structure ("ema").

    Raises:
      CheckpointError: no checkpoint, or not the one that was asked for.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoints: {directory} does not exist")
    with ocp.training.Checkpointer(directory) as manager:
        steps = sorted(saved.step for saved in manager.checkpoints)
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(f"no checkpoint {'' if step is None else step} in {directory}; there are {steps}")
        step = steps[-1] if step is None else step
        name = "params" if item == "params" else "training"
        metadata = manager.checkpointables_metadata(step).metadata[name]
        device = SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), metadata)
        loaded = manager.load_checkpointables(step, {name: abstract})[name]
    if item == "params":
        return step, loaded
    if item not in loaded["extra"]:
        raise CheckpointError(
            f"checkpoint {step} in {directory} has no extra state {item!r}: {sorted(loaded['extra'])}"
        )
    return step, loaded["extra"][item]


def read_run_config(workdir: Path) -> dict[str, Any]:
    """The resolved configuration that `train` wrote to a run directory.

    Raises:
      CheckpointError: `workdir` is not a run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{workdir} is not a run: it has no config.json")
    return json.loads(path.read_text())["config"]

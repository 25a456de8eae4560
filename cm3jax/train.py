"""The training entry point: from a resolved configuration to a run in a directory."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import jax

from cm3jax import loop
from cm3jax.config import ConfigError, dumps, fingerprint, to_dict
from cm3jax.evals.run_report import write_run_report
from cm3jax.files import write_atomic
from cm3jax.loop import RunConfig
from cm3jax.machines import MACHINE_KEYS
from cm3jax.parallel.distributed import barrier
from cm3jax.reliability.checkpoint import read_run_config
from cm3jax.state import TrainState
from cm3jax.tasks.clip import CLIPTask, CLIPTaskConfig
from cm3jax.tasks.lm import LMConfig, LMTask
from cm3jax.tasks.reader import ReaderTask, ReaderTaskConfig
from cm3jax.tasks.task import Task
from cm3jax.tasks.vqgan import VQGANTask, VQGANTaskConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The group named like `task` describes it, the others are absent."""

    task: Literal["lm", "vqgan", "reader", "clip"]
    run: RunConfig
    seed: int = 0
    lm: LMConfig | None = None
    vqgan: VQGANTaskConfig | None = None
    reader: ReaderTaskConfig | None = None
    clip: CLIPTaskConfig | None = None

    def __post_init__(self):
        given = [name for name in ("lm", "vqgan", "reader", "clip") if getattr(self, name) is not None]
        if given != [self.task]:
            raise ValueError(f"task {self.task!r} needs exactly the group {self.task!r}, found {given}")


def make_task(config: Config) -> Task:
    """The task that `config` describes, with its data opened."""
    if config.lm is not None:
        return LMTask(config.lm, seed=config.seed, steps=config.run.steps)
    if config.vqgan is not None:
        return VQGANTask(config.vqgan, seed=config.seed, steps=config.run.steps)
    if config.clip is not None:
        return CLIPTask(config.clip, seed=config.seed, steps=config.run.steps)
    assert config.reader is not None
    return ReaderTask(config.reader, seed=config.seed, steps=config.run.steps)


def train(config: Config, workdir: Path, task: Task | None = None) -> TrainState:
    """Runs `config` in `workdir`, from the start or from its newest checkpoint.

    Args:
      task: what `make_task(config)` gave, for a caller that has it already.

    Raises:
      ConfigError: `workdir` holds a run of another configuration.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if path.exists():
        _check_same_run(read_run_config(workdir), to_dict(config), workdir)
    barrier("the comparison with the configuration of the run")
    if jax.process_index() == 0:
        write_atomic(path, dumps(config).encode())
    state = loop.run(task or make_task(config), config.run, workdir, seed=config.seed, fingerprint=fingerprint(config))
    if jax.process_index() == 0:
        logger.info("report: %s", write_run_report(workdir))
    return state


def _check_same_run(old: dict[str, Any], new: dict[str, Any], workdir: Path) -> None:
    """Refuses to continue a run as another one; only the `run` group and what depends on the machine may change."""
    changed = [
        f"{key}: {old_value!r} -> {new_value!r}"
        for key, (old_value, new_value) in _differences(old, new).items()
        if not key.startswith(("run.", *MACHINE_KEYS))
    ]
    if changed:
        raise ConfigError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}); use another --workdir"
        )


def _differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found |= _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if old == new else {path: (old, new)}

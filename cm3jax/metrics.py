"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and the sinks that may copy it.

A line is `{"step": 10, "time": 1767225600.0, "loss": 3.2, ...}`: `step` counts updates done, `time` is Unix seconds,
and a value that is not finite is `null`, since JSON has no word for it. The file is the record; TensorBoard and W&B
are copies that need an extra.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np
from jaxtyping import Float, Int

from cm3jax.files import write_atomic

logger = logging.getLogger(__name__)

RESERVED = ("step", "time")

Series = tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]


class Sink(Protocol):
    """Where metrics are copied to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of one step."""

    def close(self) -> None:
        """Delivers what is still buffered."""


class MetricsWriter:
    """Appends metrics to `path`; a context manager. Every line is flushed, so a kill loses at most the last one.

    In a run of many processes one of them writes; which one is the caller's choice.

    Args:
      path: of the file; None writes nothing, for processes other than the first.
      resume_step: the restored step. Lines of later steps, which the resumed run will write again, are removed.
        None keeps every whole line.
      sinks: get a copy of every line; closed with the writer.

    Raises:
      ValueError: `path` holds something that is not metrics.
    """

    def __init__(self, path: Path | None, *, resume_step: int | None = None, sinks: Iterable[Sink] = ()):
        self.path = Path(os.devnull) if path is None else Path(path)
        self.sinks = tuple(sinks)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if path is not None and self.path.exists():
            _truncate(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends one line.

        Raises:
          ValueError: a metric is called "step" or "time".
        """
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(f"metrics of step {step}: the name {taken[0]!r} is taken by the line itself")
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": int(step), "time": time.time()} | {
            name: value if math.isfinite(value) else None for name, value in numbers.items()
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for sink in self.sinks:
            sink.write(int(step), numbers)

    def read(self) -> dict[str, Series]:
        """What the file holds by now, as `read_metrics` does."""
        return read_metrics(self.path)

    def close(self) -> None:
        self._file.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(path: Path) -> dict[str, Series]:
    """Every metric of the file as (steps [N], values [N]); null reads as NaN, a step written twice counts once, last.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not metrics; a last line cut short by a crash is left out instead.
    """
    columns: dict[str, dict[int, float]] = {}
    for _, line in _lines(Path(path)):
        for name, value in line.items():
            if name not in RESERVED:
                columns.setdefault(name, {})[line["step"]] = math.nan if value is None else float(value)
    return {
        name: (np.fromiter(column, np.int64, len(column)), np.fromiter(column.values(), np.float64, len(column)))
        for name, column in columns.items()
    }


def last_evaluation(path: Path) -> dict[str, float]:
    """The newest value of every metric called `eval/NAME`, by NAME."""
    found = read_metrics(path)
    return {name.removeprefix("eval/"): float(v[-1]) for name, (_, v) in found.items() if name.startswith("eval/")}


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines of the file, as text and parsed. What follows the last newline was cut short by a crash."""
    *whole, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if torn:
        logger.warning("%s: last line is incomplete, left out: %.80r", path, torn)
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            valid = isinstance(line, dict) and isinstance(line["step"], int)
        except (ValueError, KeyError):
            valid = False
        if not valid:
            raise ValueError(f'{path}:{number}: expected a JSON object with an integer "step", found {text[:80]!r}')
        yield text, line


def _truncate(path: Path, resume_step: int | None) -> None:
    kept = [text for text, line in _lines(path) if resume_step is None or line["step"] <= resume_step]
    write_atomic(path, "".join(f"{text}\n" for text in kept).encode())


class Meter:
    """Weighted means over many batches, from their (sum, weight) pairs; exact where batches differ in weight."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, pairs: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> None:
        """Adds one batch: name -> (sum of weight * value, sum of weight)."""
        for name, (total, weight) in pairs.items():
            old_total, old_weight = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + float(total), old_weight + float(weight))

    def means(self) -> dict[str, float]:
        """The mean of every name so far; NaN where the weight is 0."""
        return {name: total / weight if weight else math.nan for name, (total, weight) in self._totals.items()}


class TensorBoardSink:
    """Event files for TensorBoard; needs the extra `tensorboard`.

    Args:
      resume_step: events of later steps, left by a run that died, are hidden.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise RuntimeError("TensorBoardSink needs tensorboardX: pip install cm3jax[tensorboard]") from error
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; needs the extra `wandb`. The same `run_id` continues the same run."""

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("WandbSink needs wandb: pip install cm3jax[wandb]") from error
        self._run = wandb.init(project=project, id=run_id, resume="allow", config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()

"""The protocol between the loop and what it trains."""

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from cm3jax.state import TrainState

Batch = dict[str, np.ndarray]
Metrics = dict[str, jax.Array]


class Task(Protocol):
    """What the loop needs to know of a task; a task owns its model, its loss, its data and its evaluation."""

    tokens_per_batch: int  # units of throughput a global batch holds (tokens for `lm`, images for `vqgan`)
    unit: str  # what those units are called: "tokens", "images"
    flops_per_batch: float  # model FLOPs of forward + backward for one global batch, by the task's formula

    def init(self, key: jax.Array) -> TrainState:
        """Fresh state; pure, run under `jit` so that arrays are born sharded."""

    def state_specs(self) -> Any:
        """Partition specs with the structure of `TrainState`."""

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update; pure, jitted by the loop with `state` donated. Metrics are fp32 scalars."""

    def batches(self, start: int) -> Iterator[Batch]:
        """This process's rows of global batches `start`, `start + 1`, ...: each a pure function of (seed, index)."""

    def data_fingerprint(self) -> str:
        """Changes when the data would give other batches; a resume with another one is refused."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Validation numbers of the current state."""

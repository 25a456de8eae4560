"""The protocol between the loop and what it trains."""

from typing import Any, Protocol

import jax

from cm3jax.data.loader import Examples
from cm3jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(Protocol):
    """What the loop needs to know of a task; a task owns its model, its loss, its data and its evaluation."""

    @property
    def examples(self) -> Examples:
        """Training examples by index, each a pure function of it."""

    @property
    def batch_size(self) -> int:
        """Examples in a global batch; batch i holds examples `i * batch_size` and on."""

    @property
    def unit(self) -> str:
        """What throughput counts: "tokens" (lm), "images" (vqgan)."""

    @property
    def units_per_batch(self) -> int:
        """How many of them a global batch holds."""

    @property
    def flops_per_batch(self) -> float:
        """Model FLOPs of forward + backward for one global batch, by the task's formula."""

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays of a global batch; known without opening the data."""

    def init(self, key: jax.Array) -> TrainState:
        """Fresh state; pure, run under `jit` so that arrays are born sharded."""

    def state_specs(self) -> Any:
        """Partition specs with the structure of `TrainState`."""

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update; pure, jitted by the loop with `state` donated. Metrics are fp32 scalars."""

    def data_fingerprint(self) -> str:
        """Changes when the data would give other batches; a resume with another one is refused."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Validation numbers of the current state."""

"""The training state that every task carries through the loop and the checkpoint stores."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Plain pytree; `params` and the rest are nested dicts, so a checkpoint depends on no library's classes.

    The same structure describes its own layout, with a partition spec in the place of each array.

    Attributes:
      step: int32 []; updates attempted so far, and the data position: batch `step` comes next.
      params: trainable weights, fp32.
      opt_state: optax state(s).
      extra: what a task keeps beside the weights (EMA, codebook usage), `{}` if nothing.
      guard: what `reliability.anomaly` remembers: recent losses and norms, counts of skipped updates.
    """

    step: Any
    params: Any
    opt_state: Any
    extra: Any
    guard: Any

    def replace(self, **changes: Any) -> "TrainState":
        return dataclasses.replace(self, **changes)


def fresh_state(params: Any, opt_state: Any, guard: Any, extra: Any | None = None) -> TrainState:
    """A `TrainState` at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, extra or {}, guard)

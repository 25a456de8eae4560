"""Updates that would do harm are skipped on the device, without asking the host.

An update is skipped when its loss or gradient norm is not finite, or, with `sigma`, when one of them lies far above
what the last updates had. Everything but the step counter then stays as it was, so the run goes on with the next batch;
the counters are part of the state, so a resumed run skips the same updates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from cm3jax.state import TrainState

# A deviation below this share of the mean is noise, however quiet the window was.
LEAST_DEVIATION = 0.01


class AnomalyError(RuntimeError):
    """Too many updates in a row were skipped; the message has their number and the step."""


@dataclasses.dataclass(frozen=True)
class AnomalyConfig:
    """What is skipped.

    Attributes:
      sigma: standard deviations above the mean of the window at which a loss or gradient norm is a spike; None skips
        only what is not finite.
      window: updates that the mean and the deviation are taken over; no spike is called before it is full.
    """

    sigma: float | None = None
    window: int = 128

    def __post_init__(self):
        if self.window < 2 or (self.sigma is not None and self.sigma <= 0):
            raise ValueError(f"anomaly: expected window >= 2 and sigma > 0 or None, found {self}")


def fresh_guard(config: AnomalyConfig) -> dict[str, jax.Array]:
    """The part of the state that remembers: `recent` [2, window] losses and norms, `seen`, `skipped`, `in_a_row`."""
    zero = jnp.zeros((), jnp.int32)
    return {"recent": jnp.zeros((2, config.window)), "seen": zero, "skipped": zero, "in_a_row": zero}


def guard_specs() -> dict[str, P]:
    return {"recent": P(), "seen": P(), "skipped": P(), "in_a_row": P()}


def guarded(
    config: AnomalyConfig, old: TrainState, new: TrainState, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`new` at the next step if its loss and gradient norm are sound, else `old` at the next step.

    Returns:
      the state, and the metrics `grad_norm`, `skipped` (updates so far) and `skipped_in_a_row`.
    """
    values = jnp.stack([loss, norm]).astype(jnp.float32)
    sound = jnp.all(jnp.isfinite(values)) & ~_spikes(config, old.guard, values)
    place = old.guard["seen"] % config.window
    guard = {
        "recent": jnp.where(sound, old.guard["recent"].at[:, place].set(values), old.guard["recent"]),
        "seen": old.guard["seen"] + sound,
        "skipped": old.guard["skipped"] + ~sound,
        "in_a_row": jnp.where(sound, 0, old.guard["in_a_row"] + 1),
    }
    kept: Any = {
        name: jax.tree.map(lambda a, b: jnp.where(sound, a, b), getattr(new, name), getattr(old, name))
        for name in ("params", "opt_state", "extra")
    }
    metrics = {"grad_norm": norm, "skipped": guard["skipped"], "skipped_in_a_row": guard["in_a_row"]}
    state = TrainState(step=old.step + 1, guard=guard, **kept)
    return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def _spikes(config: AnomalyConfig, guard: dict[str, jax.Array], values: Float[Array, " 2"]) -> Bool[Array, ""]:
    if config.sigma is None:
        return jnp.zeros((), jnp.bool_)
    mean, deviation = guard["recent"].mean(axis=1), guard["recent"].std(axis=1)
    bound = mean + config.sigma * jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(mean))
    return jnp.any(values > bound) & (guard["seen"] >= config.window)

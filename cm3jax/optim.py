"""Optimizers and the guarded update that every task uses."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.specs import WEIGHTS
from cm3jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and decay to `final_ratio` of the peak (defaults of CM3Leon's family: linear to 10 %)."""

    learning_rate: float = 3e-4
    warmup_steps: int = 1500
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate after each of `steps` updates."""
    rest = max(1, steps - config.warmup_steps)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(1, config.warmup_steps))
    tails = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_ratio, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest, config.final_ratio),
    }
    return optax.join_schedules([warmup, tails[config.decay]()], [config.warmup_steps])


def make_optimizer(config: OptimConfig, steps: int, mask: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; `mask` (tree of bools like the params) says what is decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
        ),
    )


def decay_mask(state: nnx.State) -> Any:
    """True for matrices and kernels (Params tagged with a spec of two or more dimensions), False for the rest."""
    flat = {
        path: len(WEIGHTS[variable.get_metadata().get("spec", "replicated")]) >= 2
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.traversals.unflatten_mapping(flat)


def opt_state_specs(optimizer: optax.GradientTransformation, params: Any, specs: Any) -> Any:
    """Partition specs of the optimizer state: each moment as its weight, the counters replicated."""
    abstract = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(optimizer, lambda _, spec: spec, abstract, specs, transform_non_params=lambda _: P())


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of `state.params`; skipped on the device, and counted, if the gradient is not finite."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    state = state.replace(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    return state, {"grad_norm": norm, "skipped": state.skipped.astype(jnp.float32)}


def fresh_state(params: Any, opt_state: Any, extra: Any | None = None) -> TrainState:
    """A `TrainState` at step 0."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, params=params, opt_state=opt_state, extra=extra or {}, skipped=zero)

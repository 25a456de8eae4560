"""Optimizers and the update that every task uses."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

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


def apply_updates(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any
) -> tuple[TrainState, Float[Array, ""]]:
    """`state` with the optimizer's next weights and moments, and the global norm of `grads`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state), optax.tree.norm(grads)

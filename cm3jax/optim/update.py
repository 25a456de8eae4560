"""One update, and the layout of an optimizer's state."""

from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cm3jax.optim.blocks import Blocks
from cm3jax.state import TrainState


def apply_updates(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any
) -> tuple[TrainState, Float[Array, ""]]:
    """`state` with the optimizer's next weights and moments, and the global norm of `grads`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state), optax.tree.norm(grads)


def opt_state_specs(optimizer: optax.GradientTransformation, params: Any, specs: Any) -> Any:
    """Partition specs of the optimizer state: each moment as its weight, the counters replicated.

    A moment is known by its path, which ends with the path of its weight; the scales of blocks are laid out as the
    codes, whose axes they share.

    Args:
      params: (abstract) weights, a nested dict.
      specs: of the weights, the same nested dict.
    """
    by_path = {path: spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=lambda node: isinstance(node, P))}

    def spec_of(path: tuple[Any, ...], leaf: Any) -> Any:
        tails = (path[start:] for start in range(len(path)))
        spec = next((by_path[tail] for tail in tails if tail in by_path), P())
        return Blocks(codes=spec, scales=spec) if isinstance(leaf, Blocks) else spec

    abstract = jax.eval_shape(optimizer.init, params)
    return jax.tree.map_with_path(spec_of, abstract, is_leaf=lambda node: isinstance(node, Blocks))

"""One network and its optimizer as training state: what tasks of a single network share."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from cm3jax.optim import OptimConfig, apply_gradients, decay_mask, fresh_state, make_optimizer, opt_state_specs
from cm3jax.parallel.specs import weight_specs
from cm3jax.state import TrainState


class Network:
    """A module split once into its structure and a nested dict of weights."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], optim: OptimConfig, steps: int):
        """`build(rngs)` makes the module; `steps` is the length of the learning-rate schedule."""
        self._build = build
        self._graphdef, self._abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        self._optimizer = make_optimizer(optim, steps, decay_mask(self._abstract))

    @property
    def abstract(self) -> Any:
        """Shapes of the weights."""
        return nnx.to_pure_dict(self._abstract)

    def init(self, key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))
        return fresh_state(params, self._optimizer.init(params))

    def state_specs(self) -> TrainState:
        specs = weight_specs(self._abstract)
        moments = opt_state_specs(self._optimizer, self.abstract, specs)
        return TrainState(step=P(), params=specs, opt_state=moments, extra={}, skipped=P())

    def merge(self, params: Any) -> Any:
        """The module with these weights."""
        return nnx.merge(self._graphdef, params)

    def update(self, state: TrainState, gradients: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One guarded update; see `optim.apply_gradients`."""
        return apply_gradients(self._optimizer, state, gradients)

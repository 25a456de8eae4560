"""One network and its optimizer as training state: what tasks of a single network share."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cm3jax.optim import OptimConfig, apply_updates, make_optimizer, opt_state_specs
from cm3jax.parallel.specs import weight_names, weight_specs
from cm3jax.reliability.anomaly import AnomalyConfig, fresh_guard, guard_specs, guarded
from cm3jax.state import TrainState, fresh_state


class Network:
    """A module split once into its structure and a nested dict of weights."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], optim: OptimConfig, anomaly: AnomalyConfig, steps: int):
        """`build(rngs)` makes the module; `steps` is the length of the learning-rate schedule."""
        self._build, self._anomaly = build, anomaly
        self._graphdef, self._abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        self._optimizer = make_optimizer(optim, steps, weight_names(self._abstract))

    @property
    def abstract(self) -> Any:
        """Shapes of the weights."""
        return nnx.to_pure_dict(self._abstract)

    def init(self, key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))
        return fresh_state(params, self._optimizer.init(params), fresh_guard(self._anomaly))

    def state_specs(self) -> TrainState:
        specs = self.specs
        moments = opt_state_specs(self._optimizer, self.abstract, specs)
        return TrainState(step=P(), params=specs, opt_state=moments, extra={}, guard=guard_specs())

    @property
    def specs(self) -> Any:
        """Partition specs of the weights."""
        return weight_specs(self._abstract)

    def merge(self, params: Any) -> Any:
        """The module with these weights."""
        return nnx.merge(self._graphdef, params)

    def update(
        self, state: TrainState, gradients: Any, loss: Float[Array, ""]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update, unless loss or gradient are unsound; see `reliability.anomaly`."""
        updated, norm = apply_updates(self._optimizer, state, gradients)
        return guarded(self._anomaly, state, updated, loss, norm)

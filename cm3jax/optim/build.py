"""From a configuration to an optimizer."""

from typing import Any

import jax
import optax

from cm3jax.optim.config import OptimConfig, schedule
from cm3jax.optim.moments import stored
from cm3jax.optim.muon import is_hidden, muon_direction
from cm3jax.parallel.specs import WEIGHTS


def make_optimizer(config: OptimConfig, steps: int, names: Any) -> optax.GradientTransformation:
    """Clip by global norm, direction, decay of matrices and kernels, learning rate.

    Args:
      steps: length of the schedule.
      names: of the weights' specs, a tree like the weights; specs of two or more dimensions are decayed.

    Raises:
      ValueError: Muon for weights among which no hidden matrix is.
    """
    decayed = jax.tree.map(lambda name: len(WEIGHTS[name]) >= 2, names)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            _direction(config, names),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule(config, steps)),
        ),
    )


def _direction(config: OptimConfig, names: Any) -> optax.GradientTransformation:
    by_path = dict(jax.tree.leaves_with_path(names))
    adam = stored(optax.scale_by_adam(config.b1, config.b2, config.eps), config.moments, by_path)
    if config.name == "adamw":
        return adam
    if not any(map(is_hidden, by_path.values())):
        raise ValueError(f"optim.name is 'muon', but no weight is a hidden matrix: {sorted(set(by_path.values()))}")
    labels = jax.tree.map(lambda name: "muon" if is_hidden(name) else "adamw", names)
    return optax.partition({"adamw": adam, "muon": muon_direction(config.momentum, config.moments, by_path)}, labels)

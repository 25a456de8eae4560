"""Optimizers by name, how their moments are stored, and the update that every task uses."""

from cm3jax.optim.build import make_optimizer
from cm3jax.optim.config import OptimConfig, schedule
from cm3jax.optim.update import apply_updates, opt_state_specs

__all__ = ["OptimConfig", "apply_updates", "make_optimizer", "opt_state_specs", "schedule"]

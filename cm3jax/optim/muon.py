"""Muon: momentum whose matrix is made orthogonal (Jordan et al. 2024; at scale: Liu et al. 2025, arXiv 2502.16982)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cm3jax.optim.moments import Kind, stored
from cm3jax.parallel.specs import INPUT_AXES, WEIGHTS

# Root mean square of AdamW's updates, which Muon's are given too (arXiv 2502.16982, section 2.2): one learning rate and
# one weight decay then suit both.
UPDATE_RMS = 0.2


def is_hidden(name: str) -> bool:
    """Whether Muon updates weights of that spec."""
    return name in INPUT_AXES


def muon_direction(momentum: float, kind: Kind, names: Mapping[tuple[Any, ...], str]) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal by five Newton-Schulz steps, times UPDATE_RMS sqrt(max(inputs, outputs)).

    Args:
      names: of the weights' specs, by path; every weight that is updated is hidden.
    """

    def matrices(updates: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: _dimensions(names[path]), updates)

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree.map_with_path(lambda path, x: _rms_factor(names[path], x.shape) * x, updates)

    return optax.chain(
        stored(scale_by_muon(beta=momentum, weight_dimension_numbers=matrices), kind, names),
        optax.stateless(scaled),
    )


def _dimensions(name: str) -> MuonDimensionNumbers:
    axes, inputs = len(WEIGHTS[name]), INPUT_AXES[name]
    return MuonDimensionNumbers(tuple(range(-axes, inputs - axes)), tuple(range(inputs - axes, 0)))


def _rms_factor(name: str, shape: tuple[int, ...]) -> float:
    split = len(shape) - len(WEIGHTS[name]) + INPUT_AXES[name]
    inputs, outputs = shape[len(shape) - len(WEIGHTS[name]) : split], shape[split:]
    return UPDATE_RMS * math.sqrt(max(math.prod(inputs), math.prod(outputs)))

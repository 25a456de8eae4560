"""Moments in one byte a weight: integer codes with one scale for each block of neighbours.

Codes have the shape of the weight and scales its shape with one axis shortened, so both are laid out on a mesh as the
weight itself. Levels are close together near zero, as in 8-bit optimizers (Dettmers et al. 2021, arXiv 2110.02861);
rounding is random between the two nearest levels, so that an average that moves by less than a level still moves, in
expectation by the right amount.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Positive codes: the range of int8 without -128.
LEVELS = 127
# The smallest second moment in a block, as a power of two below the block's largest.
OCTAVES = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Attributes:
    codes: of the shape of the weight.
    scales: largest magnitude of each block; the blocked axis is shorter by the size of a block.
    """

    codes: Any
    scales: Any


def encode_signed(x: Float[Array, "..."], axis: int, block: int, key: jax.Array) -> Blocks:
    """`x` as its sign and its share of the block's largest magnitude, on the levels (n / 127)^2.

    Args:
      axis: along which `block` neighbours share a scale, counted from the end.
    """
    shares, scales = _shares(jnp.abs(x), axis, block)
    n = _round(shares, LEVELS * jnp.sqrt(shares), _square, LEVELS, key)
    return Blocks((jnp.sign(x) * n.reshape(x.shape)).astype(jnp.int8), scales)


def decode_signed(blocks: Blocks, axis: int) -> Float[Array, "..."]:
    codes = blocks.codes.astype(jnp.float32)
    return jnp.sign(codes) * _scaled(_square(jnp.abs(codes)), blocks.scales, axis)


def encode_positive(x: Float[Array, "..."], axis: int, block: int, key: jax.Array) -> Blocks:
    """`x` >= 0 as its share of the block's largest value, on 255 levels from 1 down to 2^-OCTAVES.

    What is smaller is taken for the smallest level: a second moment divides, so it is never zero while its block is
    not.
    """
    shares, scales = _shares(x, axis, block)
    shares = jnp.maximum(shares, 2.0**-OCTAVES)
    n = _round(shares, 2 * LEVELS * (1 + jnp.log2(shares) / OCTAVES), _power, 2 * LEVELS, key)
    return Blocks((n.reshape(x.shape) - LEVELS).astype(jnp.int8), scales)


def decode_positive(blocks: Blocks, axis: int) -> Float[Array, "..."]:
    return _scaled(_power(blocks.codes.astype(jnp.float32) + LEVELS), blocks.scales, axis)


def _square(n: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.square(n / LEVELS)


def _power(n: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.exp2(OCTAVES * (n / (2 * LEVELS) - 1))


def _round(
    shares: Float[Array, "..."],
    places: Float[Array, "..."],
    level: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    top: int,
    key: jax.Array,
) -> Float[Array, "..."]:
    """The number, 0 to `top`, of the level below or above each share, so that the mean of many draws is the share."""
    below = jnp.clip(jnp.floor(places), 0, top - 1)
    low, high = level(below), level(below + 1)
    return below + (jax.random.uniform(key, shares.shape) < (shares - low) / (high - low))


def _shares(x: Float[Array, "..."], axis: int, block: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`x` by blocks, each divided by its largest value, and those values."""
    blocked = _blocked(x, axis, block)
    scales = jnp.max(blocked, axis=axis)
    safe = jnp.where(scales > 0, scales, 1.0)
    return blocked / jnp.expand_dims(safe, axis), scales


def _scaled(values: Float[Array, "..."], scales: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    blocked = _blocked(values, axis, values.shape[axis] // scales.shape[axis])
    return (blocked * jnp.expand_dims(scales, axis)).reshape(values.shape)


def _blocked(x: Float[Array, "..."], axis: int, block: int) -> Float[Array, "..."]:
    """[..., n, ...] as [..., n / block, block, ...]; counted from the end, the new axis has the place of the old."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // block, block, *x.shape[at + 1 :])

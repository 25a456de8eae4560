"""Checksums of arrays that live on many devices.

A checksum is the sum, modulo 2^32, of the array's words of up to 32 bits, each times an odd weight drawn from its
position. An odd weight is invertible modulo 2^32, so a single changed bit always changes the sum; and since addition of
integers is exact and commutative, the sum does not depend on how the array is sharded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """The checksum of one array, by its global positions."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    return jnp.sum(words * _weights(words.shape), dtype=jnp.uint32)


def _weights(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """An odd number for every position, neighbours' unlike each other."""
    place = jnp.zeros(shape, jnp.uint32)
    for dimension, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dimension)
    # A multiplicative hash (Knuth, TAOCP 3, section 6.4), folded so that the high bits reach the low ones.
    mixed = place * jnp.uint32(2654435761)
    return (mixed ^ (mixed >> 15)) | jnp.uint32(1)


@jax.jit
def checksums(tree: Any) -> UInt32[Array, " leaves"]:
    """Checksums of all arrays of a tree, in its order, the same on any mesh."""
    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])

"""Thresholds that keep the k largest values, or a share of the mass, for each row with its own k or share.

A sort of all values for every token would cost more than the model's step on small models. The threshold is found bit
by bit instead: 32 sums over the row, exact to the last bit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

BITS = 32


def largest(values: Float[Array, "B V"], k: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """True for the k largest values of a row and all that equal the last of them; k >= 1."""
    keys = _ordered(values)
    threshold = _threshold(lambda kept: jnp.sum(kept, axis=-1) >= k, keys)
    return keys >= threshold[:, None]


def kth_largest(values: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The k-th largest value of each row, the smallest where a row has fewer; k >= 1."""
    return jnp.min(jnp.where(largest(values, k), values, jnp.inf), axis=-1)


def nucleus(logits: Float[Array, "B V"], share: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """True where all more likely ids together have less than `share` of the probability (arXiv 1904.09751)."""
    keys = _ordered(logits)
    shares = jax.nn.softmax(logits, axis=-1)
    threshold = _threshold(lambda kept: jnp.sum(jnp.where(kept, shares, 0), axis=-1) >= share, keys)
    # With a share of 1 rounding in the sum must not cut the tail.
    return (keys >= threshold[:, None]) | (share >= 1)[:, None]


def _ordered(values: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats; both zeros are one number."""
    values = jnp.where(values == 0, 0.0, values).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    top = jnp.uint32(1 << (BITS - 1))
    return jnp.where(bits >= top, ~bits, bits | top)


def _threshold(enough, keys: UInt32[Array, "B V"]) -> UInt32[Array, " B"]:
    """The largest number of each row such that `enough(keys >= number)`; 0 where there is none."""

    def bit(i, low):
        tried = low | (jnp.uint32(1) << (BITS - 1 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= tried[:, None]), tried, low)

    # Some bits of a turn at once: on GPUs a turn has kernels of its own, which take longer to start than to run.
    return jax.lax.fori_loop(0, BITS, bit, jnp.zeros(keys.shape[0], jnp.uint32), unroll=4)

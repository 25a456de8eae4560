"""The device side of exact search: from each bin of a bank its best row, by scores of low precision.

A tile of T rows has T / L bins; bin j holds the rows j, j + T / L, j + 2 T / L ... of the tile, so that the maximum
over a bin is a maximum of whole vectors of scores. The places of rows within their bins (0 ... L - 1) travel in the
lowest bits of the scores: one maximum then gives value and place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cm3jax.parallel.mesh import AXES

# Where there is no row. Finite, since the place that replaces its lowest bits would make an infinity NaN.
NOTHING = -3.0e38
# Rows of the bank over all devices; queries and what was found whole on each, with a leading axis of devices.
ROWS, WHOLE, FOUND = P(AXES, None), P(), P(AXES)

# Best scores and ids of bins so far [devices, Q, kept], and the best score of a row that is not the best of its bin.
Found = tuple[Float[Array, "devices Q kept"], Int[Array, "devices Q kept"], Float[Array, "devices Q"]]


def nothing_found(devices: int, queries: int, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What stands before the first rows."""
    shape = (devices, queries, kept)
    # NumPy's arrays: work for the devices would wait for what they are at.
    return np.full(shape, NOTHING, np.float32), np.full(shape, -1, np.int32), np.full(shape[:2], NOTHING, np.float32)


@functools.cache
def filter_step(mesh: jax.sharding.Mesh, tile: int, bin_size: int, kept: int, dtype: str) -> Any:
    """The compiled `step(found, queries [Q, D], rows [R, D], first, end) -> found` over the devices of `mesh`.

    `rows` are the rows from id `first` on, split evenly, each part a multiple of `tile`; ids from `end` on are padding.
    """

    def local(found: Found, queries: Array, rows: Array, first: Array, end: Array) -> Found:
        scores, ids, second = (part[0] for part in found)
        first = first + rows.shape[0] * jax.lax.axis_index(AXES)
        best, best_ids, others = _bins(queries.astype(dtype), rows.astype(dtype), first, end, tile, bin_size)
        scores, places = jax.lax.top_k(jnp.concatenate([scores, best], axis=1), kept)
        ids = jnp.take_along_axis(jnp.concatenate([ids, best_ids], axis=1), places, axis=1)
        return scores[None], ids[None], jnp.maximum(second, others)[None]

    specs = (FOUND, FOUND, FOUND)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, WHOLE, ROWS, WHOLE, WHOLE), out_specs=specs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def _bins(
    queries: Float[Array, "Q D"],
    rows: Float[Array, "R D"],
    first: Int[Array, ""],
    end: Int[Array, ""],
    tile: int,
    bin_size: int,
) -> tuple[Float[Array, "Q bins"], Int[Array, "Q bins"], Float[Array, " Q"]]:
    """Of each bin its best score and id; over all bins the best score of a row that is second in its bin."""
    width = tile // bin_size
    # XLA's default for fp32 on some accelerators is a product of lower precision than the bound allows for.
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def one_tile(start: Array, part: Array) -> tuple[Array, tuple[Array, Array]]:
        scores = product(queries, part).reshape(len(queries), bin_size, width)
        column = start + jnp.arange(width)
        best = second = jnp.full((len(queries), width), NOTHING)
        for place in range(bin_size):
            score = _with_place(jnp.where(column + place * width < end, scores[:, place], NOTHING), place, bin_size)
            second = jnp.maximum(second, jnp.minimum(best, score))
            best = jnp.maximum(best, score)
        return start + tile, (best, second.max(axis=1))

    _, (best, second) = jax.lax.scan(one_tile, first, rows.reshape(-1, tile, rows.shape[1]))
    place = jax.lax.bitcast_convert_type(best, jnp.int32) & (bin_size - 1)
    starts = first + tile * jnp.arange(len(best))
    ids = starts[:, None, None] + place * width + jnp.arange(width)
    flat = (len(queries), -1)
    return jnp.swapaxes(best, 0, 1).reshape(flat), jnp.swapaxes(ids, 0, 1).reshape(flat), second.max(axis=0)


def _with_place(scores: Float[Array, "Q W"], place: int, bin_size: int) -> Float[Array, "Q W"]:
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jax.lax.bitcast_convert_type((bits & -bin_size) | place, jnp.float32)

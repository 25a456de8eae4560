"""Attention of a whole sequence without all its scores, in plain array operations that run on any device.

Blocks of queries visit only the chunks of keys that causality and the window leave them; sums over chunks are corrected
as larger scores appear, and the backward pass recomputes each block's shares from the saved logarithm of its
denominator (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cm3jax.kernels.attention.mask import Mask

# Eight blocks of queries leave 9/16 of the dense work; with blocks shorter than 128 the matrix products are too small.
QUERY_BLOCKS = 8
SHORTEST_BLOCK = 128
# Longest chunk of keys that a block of queries visits at once.
KEY_CHUNK = 2048
# Of the output and the logarithms of the denominators, for the policies of `models.remat`.
RESIDUAL = "attention"
LOWEST = -1e30

Heads = Float[Array, "B G R T K"]
Keys = Float[Array, "B G S K"]


def chunked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    mask: Mask,
    block: int | None = None,
    chunk: int = KEY_CHUNK,
) -> Float[Array, "B T H K"]:
    """`dense_attention` of a whole sequence; scores in memory are [B, H, block, chunk].

    Args:
      mask: without positions.
      block: queries at a time; by default an eighth of the sequence. Neither needs to divide its length.
      chunk: keys at a time.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    block = block or max(SHORTEST_BLOCK, -(-length // QUERY_BLOCKS))
    grouped = jnp.moveaxis(q.reshape(batch, length, groups, heads // groups, width), 1, 3)
    out = _attend(grouped, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask.segments, mask.window, block, chunk)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
    q: Heads, k: Keys, v: Keys, segments: Int[Array, "B T"] | None, window: int | None, block: int, chunk: int
) -> Heads:
    return _forward(q, k, v, segments, window, block, chunk)[0]


def _forward(q, k, v, segments, window, block, chunk):
    mask = Mask(segments=segments, window=window)
    found = [_one_block(q, k, v, mask, rows, chunk) for rows in _blocks(0, q.shape[3], block)]
    out, log_sums = (jnp.concatenate(parts, axis=3) for parts in zip(*found, strict=True))
    out, log_sums = checkpoint_name(out, RESIDUAL), checkpoint_name(log_sums, RESIDUAL)
    return out, (q, k, v, segments, out, log_sums)


def _one_block(
    q: Heads, k: Keys, v: Keys, mask: Mask, rows: slice, chunk: int
) -> tuple[Float[Array, "B G R t K"], Float[Array, "B G R t 1"]]:
    """Outputs of the queries `rows`, and the logarithms of their denominators."""
    largest = total = mixed = None
    for columns in _blocks(*mask.keys_of(rows.start, rows.stop), chunk):
        scores = _scores(q, k, mask, rows, columns)
        now = jnp.max(scores, axis=-1, keepdims=True)
        now = now if largest is None else jnp.maximum(largest, now)
        shares = jnp.exp(scores - now)
        summed = jnp.sum(shares, axis=-1, keepdims=True)
        part = _product("bgrts,bgsk->bgrtk", shares.astype(v.dtype), v[:, :, columns])
        if largest is None:
            total, mixed = summed, part
        else:
            shrunk = jnp.exp(largest - now)
            total, mixed = total * shrunk + summed, mixed * shrunk + part
        largest = now
    # A row whose first chunk shows it nothing has counted that chunk in full; its own key, in the last chunk, then
    # shrinks what was counted to zero.
    return (mixed / total).astype(q.dtype), largest + jnp.log(total)


def _backward(window, block, chunk, residuals, cotangent):
    q, k, v, segments, out, log_sums = residuals
    mask = Mask(segments=segments, window=window)
    # Row sums of shares * d(shares): what the softmax takes off each score's gradient.
    offsets = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows in _blocks(0, q.shape[3], block):
        dq_rows = jnp.zeros((), jnp.float32)
        for columns in _blocks(*mask.keys_of(rows.start, rows.stop), chunk):
            shares = jnp.exp(_scores(q, k, mask, rows, columns) - log_sums[:, :, :, rows])
            d_out = cotangent[:, :, :, rows]
            dv = dv.at[:, :, columns].add(_product("bgrts,bgrtk->bgsk", shares.astype(v.dtype), d_out))
            d_shares = _product("bgrtk,bgsk->bgrts", d_out, v[:, :, columns])
            d_scores = (shares * (d_shares - offsets[:, :, :, rows]) * q.shape[-1] ** -0.5).astype(q.dtype)
            dq_rows = dq_rows + _product("bgrts,bgsk->bgrtk", d_scores, k[:, :, columns])
            dk = dk.at[:, :, columns].add(_product("bgrts,bgrtk->bgsk", d_scores, q[:, :, :, rows]))
        dq.append(dq_rows.astype(q.dtype))
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(q: Heads, k: Keys, mask: Mask, rows: slice, columns: slice) -> Float[Array, "B G R t s"]:
    scores = _product("bgrtk,bgsk->bgrts", q[:, :, :, rows], k[:, :, columns]) * q.shape[-1] ** -0.5
    visible = mask.block(rows, columns)
    return scores if visible is None else jnp.where(visible[:, None, None], scores, LOWEST)


def _product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _blocks(start: int, end: int, size: int) -> Iterator[slice]:
    for at in range(start, end, size):
        yield slice(at, min(at + size, end))

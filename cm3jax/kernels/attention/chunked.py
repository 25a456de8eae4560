"""Attention of a whole sequence a block at a time, in plain array operations that run on any device.

Each block of queries visits only the blocks of keys that causality and the window leave it. Sums are corrected as
larger scores appear, and the backward pass recomputes shares from the saved logarithm of their denominator
(FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2). The loops are loops of the compiled program, so that no two
blocks of scores are ever in memory at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from cm3jax.kernels.attention.mask import Mask, visible

# A block of 128 x 128 scores stays in a CPU's cache.
BLOCK = 128
# Of the output and the logarithms of the denominators, for the policies of `models.remat`.
RESIDUAL = "attention"
LOWEST = -1e30

Heads = Float[Array, "B T G R K"]
Keys = Float[Array, "B T G K"]
Rows = Float[Array, "B G Rt K"]


def chunked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    mask: Mask,
    block: int = BLOCK,
) -> Float[Array, "B T H K"]:
    """`dense_attention` of a whole sequence; scores in memory are [B, H, block, block].

    Args:
      mask: without positions.
      block: queries and keys at a time; the length needs not be a multiple.
    """
    batch, length, heads, width = q.shape
    groups, block = k.shape[2], min(block, length)
    pad = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    segments = None if mask.segments is None else jnp.pad(mask.segments, ((0, 0), (0, pad)))
    grouped = q.reshape(batch, length + pad, groups, heads // groups, width)
    out = _attend(grouped, k, v, segments, mask.window, block)
    return out.reshape(batch, length + pad, heads, width)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Heads, k: Keys, v: Keys, segments: Int[Array, "B T"] | None, window: int | None, block: int) -> Heads:
    return _forward(q, k, v, segments, window, block)[0]


def _forward(
    q: Heads, k: Keys, v: Keys, segments: Int[Array, "B T"] | None, window: int | None, block: int
) -> tuple[Heads, tuple[Any, ...]]:
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def rows(_: None, i: Int[Array, ""]) -> tuple[None, Any]:
        q_rows = _queries(q, i, block)

        def columns(j: Int[Array, ""], carry: Any) -> Any:
            largest, total, mixed = carry
            scores = _product("bgtk,bgsk->bgts", q_rows, _block(keys, j, block, 2)) * q.shape[-1] ** -0.5
            scores = jnp.where(_seen(q_rows, segments, window, i, j, block), scores, LOWEST)
            now = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
            shares, shrunk = jnp.exp(scores - now), jnp.exp(largest - now)
            part = _product("bgts,bgsk->bgtk", shares.astype(v.dtype), _block(values, j, block, 2))
            return now, total * shrunk + jnp.sum(shares, axis=-1, keepdims=True), mixed * shrunk + part

        lowest = jnp.full((*q_rows.shape[:-1], 1), LOWEST)
        start = (lowest, jnp.zeros_like(lowest), jnp.zeros(q_rows.shape, jnp.float32))
        # A row to which a block shows nothing counts that block in full; its own key, in the last block, then shrinks
        # what was counted to zero.
        largest, total, mixed = jax.lax.fori_loop(_first(i, window, block), i + 1, columns, start)
        return None, ((mixed / total).astype(q.dtype), largest + jnp.log(total))

    _, (out, log_sums) = jax.lax.scan(rows, None, jnp.arange(q.shape[1] // block))
    out, log_sums = checkpoint_name(_joined(out, q.shape), RESIDUAL), checkpoint_name(log_sums, RESIDUAL)
    return out, (q, k, v, segments, out, log_sums)


def _backward(
    window: int | None, block: int, residuals: tuple[Any, ...], cotangent: Heads
) -> tuple[Heads, Keys, Keys, None]:
    q, k, v, segments, out, log_sums = residuals
    # Row sums of shares * d(shares): what the softmax takes off each score's gradient.
    # As a product, since XLA's sums over the last axis are of one number after the other on CPUs; accelerators would
    # round what goes into it if they were not told otherwise.
    exact = jax.lax.Precision.HIGHEST
    offsets = _product("btgrk,btgrk->btgr", cotangent, out, exact)[..., None]
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scale = q.shape[-1] ** -0.5

    def rows(carry: Any, inputs: Any) -> tuple[Any, Any]:
        i, log_sum = inputs
        q_rows, d_out, offset = (_queries(x, i, block) for x in (q, cotangent, offsets))
        log_sum, offset = jnp.swapaxes(log_sum, 2, 3), jnp.swapaxes(offset, 2, 3)

        def columns(j: Int[Array, ""], carry: Any) -> Any:
            # Scores with keys before queries: of the products that follow only one is then of a transposed block, for
            # which XLA is slower on CPUs.
            dq, dk, dv = carry
            k_rows, v_rows = (_block(x, j, block, 2) for x in (keys, values))
            seen = jnp.swapaxes(_seen(q_rows, segments, window, i, j, block), 2, 3)
            scores = jnp.where(seen, _product("bgsk,bgtk->bgst", k_rows, q_rows) * scale, LOWEST)
            shares = jnp.exp(scores - log_sum)
            d_shares = _product("bgsk,bgtk->bgst", v_rows, d_out)
            d_scores = (shares * (d_shares - offset) * scale).astype(q.dtype)
            dq = dq + _product("bgst,bgsk->bgtk", d_scores, k_rows)
            dk = _added(dk, j, _product("bgst,bgtk->bgsk", d_scores, q_rows))
            return dq, dk, _added(dv, j, _product("bgst,bgtk->bgsk", shares.astype(v.dtype), d_out))

        start = (jnp.zeros(q_rows.shape, jnp.float32), *carry)
        dq, *carry = jax.lax.fori_loop(_first(i, window, block), i + 1, columns, start)
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(rows, (zeros, zeros), (jnp.arange(len(log_sums)), log_sums))
    dk, dv = jnp.swapaxes(dk, 1, 2).astype(k.dtype), jnp.swapaxes(dv, 1, 2).astype(v.dtype)
    return _joined(dq, q.shape), dk, dv, None


_attend.defvjp(_forward, _backward)


def _first(i: Int[Array, ""], window: int | None, block: int) -> Int[Array, ""]:
    """The first block of keys that any query of block i sees."""
    return jnp.zeros_like(i) if window is None else jnp.maximum(0, (i * block + 1 - window) // block)


def _seen(
    q_rows: Rows,
    segments: Int[Array, "B T"] | None,
    window: int | None,
    i: Int[Array, ""],
    j: Int[Array, ""],
    block: int,
) -> Bool[Array, "#B 1 Rt s"]:
    """Which keys of block j the queries of block i see."""
    queries, keys = i * block + jnp.arange(block)[:, None], j * block + jnp.arange(block)
    seen = visible(queries, keys, window)[None]
    if segments is not None:
        seen = seen & (_block(segments, i, block, 1)[:, :, None] == _block(segments, j, block, 1)[:, None])
    return jnp.tile(seen, (1, q_rows.shape[2] // block, 1))[:, None]


def _queries(x: Heads, i: Int[Array, ""], block: int) -> Rows:
    """Block i of each query head that shares a key head, one behind the other.

    On one axis: for a product that sums over two, XLA first transposes both sides in memory on CPUs.
    """
    rows = jnp.moveaxis(_block(x, i, block, 1), 1, 3)
    return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])


def _block(x: Any, i: Int[Array, ""], block: int, axis: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _added(x: Float[Array, "B G T K"], j: Int[Array, ""], part: Float[Array, "B G s K"]) -> Float[Array, "B G T K"]:
    block = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, j, block, 2) + part, j * block, 2)


def _joined(blocks: Float[Array, "n B G Rt K"], shape: tuple[int, ...]) -> Heads:
    """The blocks of queries one behind the other, in `shape`."""
    batch, _, groups, queries, width = shape
    apart = blocks.reshape(len(blocks), batch, groups, queries, -1, width)
    return jnp.transpose(apart, (1, 0, 4, 2, 3, 5)).reshape(shape)


def _product(
    subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."], precision: jax.lax.Precision | None = None
) -> Float[Array, "..."]:
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)

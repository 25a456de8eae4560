"""Causal attention: the readable form, and its twin that never holds all scores at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dense_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    positions: Int[Array, "b T"],
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v, where a query at position p sees the keys in slots 0 .. p.

    G key heads serve H = G * R query heads (grouped-query attention, arXiv 2305.13245). Softmax in fp32.

    Args:
      positions: of the queries, one row for all of the batch (b = 1) or one each (b = B).
    """
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * width**-0.5
    visible = jnp.arange(k.shape[1]) <= positions[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", shares, v).reshape(batch, queries, heads, width)


def blockwise_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], block: int
) -> Float[Array, "B T H K"]:
    """Dense attention of a whole sequence with itself, `block` queries at a time.

    Each block reads only the keys up to its end, which halves the work, and is recomputed in the backward pass, so the
    memory for scores is [B, H, block, T] instead of [B, H, T, T].
    """
    attend = jax.checkpoint(dense_attention)
    blocks = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        positions = jnp.arange(start, end)[None]
        blocks.append(attend(q[:, start:end], k[:, :end], v[:, :end], positions))
    return jnp.concatenate(blocks, axis=1)

"""Attention as its formula reads, with all scores in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm3jax.kernels.attention.mask import Mask


def dense_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], mask: Mask
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys that `mask` shows. Softmax in fp32.

    G key heads serve H = G * R query heads (grouped-query attention, arXiv 2305.13245).
    """
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * width**-0.5
    visible = mask.dense(queries, k.shape[1])[:, None, None]
    shares = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", shares, v).reshape(batch, queries, heads, width)

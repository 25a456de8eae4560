"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm3jax.kernels.attention.mask import Mask

WIDEST_HEAD = 128
# JAX's primitive of the forward pass: its results, the output and the logarithms of the sums, are all that the backward
# pass needs beside q, k and v.
FORWARD = "dot_product_attention_fwd_wrapper"


def cudnn_refuses(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], mask: Mask, mesh: jax.sharding.AbstractMesh
) -> str | None:
    """Why cuDNN cannot take these arrays; None if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, found {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > WIDEST_HEAD:
        return f"it needs a head_dim that is a multiple of 8 up to {WIDEST_HEAD}, found {q.shape[3]}"
    if q.shape[1] % 2:
        return f"its backward pass needs an even length, found {q.shape[1]}"
    return None


def cudnn_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], mask: Mask
) -> Float[Array, "B T H K"]:
    """`dense_attention` of a whole sequence. Segments become a mask [B, 1, T, T], which is held in memory."""
    visible, length = None, q.shape[1]
    if mask.segments is not None:
        visible = (mask.segments[:, :, None] == mask.segments[:, None, :])[:, None]
    window = None if mask.window is None or mask.window >= length else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=visible, is_causal=True, local_window_size=window, implementation="cudnn"
    )

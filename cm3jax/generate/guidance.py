"""Guidance: the next token is drawn from a mixture of the logits of several streams of one request.

Streams see different prompts and are fed the same drawn tokens. The weights sum to one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def classifier_free(scale: float) -> tuple[float, float]:
    """Weights of (conditional, unconditional): l_u + scale (l_c - l_u) (CM3Leon, arXiv 2309.02591, section 3.3)."""
    return scale, 1.0 - scale


def two_way(image_scale: float, text_scale: float) -> tuple[float, float, float]:
    """Weights of (full, image only, unconditional) for editing an image by an instruction.

    l_u + image_scale (l_i - l_u) + text_scale (l_f - l_i) (InstructPix2Pix, arXiv 2211.09800, eq. 3).
    """
    return text_scale, image_scale - text_scale, 1.0 - image_scale


def mix(logits: Float[Array, "streams B V"], weights: Float[Array, " streams"]) -> Float[Array, "B V"]:
    """Weighted sum over the streams; forbidden ids are masked afterwards, since -inf cannot be mixed."""
    return jnp.sum(logits * weights[:, None, None], axis=0)

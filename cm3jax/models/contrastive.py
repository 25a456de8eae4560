"""Losses of dual encoders on a global batch: pair i of images and texts belongs together, all others do not.

Each device compares its own rows with the features of the whole batch, so the [B, B] similarities are never on one
device; what is gathered are the features.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm3jax.parallel.specs import constrain, replicated


def softmax_loss(images: Float[Array, "B E"], texts: Float[Array, "B E"], scale: Float[Array, ""]) -> Float[Array, ""]:
    """Mean cross-entropy of finding each image's text and each text's image (CLIP, arXiv 2103.00020, figure 3).

    Args:
      images, texts: features of length 1.
    """
    towards_texts = constrain(scale * images @ replicated(texts).T, "features")
    towards_images = constrain(scale * texts @ replicated(images).T, "features")
    right = scale * jnp.sum(images * texts, axis=-1)
    missed = jax.nn.logsumexp(towards_texts, axis=-1) + jax.nn.logsumexp(towards_images, axis=-1)
    return jnp.mean(missed / 2 - right)


def sigmoid_loss(
    images: Float[Array, "B E"], texts: Float[Array, "B E"], scale: Float[Array, ""], bias: Float[Array, ""]
) -> Float[Array, ""]:
    """Every pair alone told as right or wrong, summed over texts, mean over images (SigLIP, arXiv 2303.15343, eq. 1).

    Args:
      images, texts: features of length 1.
    """
    logits = constrain(scale * images @ replicated(texts).T + bias, "features")
    signs = 2 * jnp.eye(len(images)) - 1
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=-1))


def recall(
    queries: Float[np.ndarray, "Q E"], targets: Float[np.ndarray, "N E"], right: Float[np.ndarray, "Q N"], k: int
) -> float:
    """Share of the queries with a right target among the k most similar; `right` is 1 where a target is right."""
    best = np.argsort(-(queries @ targets.T), axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(right > 0, best, axis=1).any(axis=1).mean())


def chance_recall(right: Float[np.ndarray, "Q N"], k: int) -> float:
    """The recall at k of a random order: with r of N targets right, 1 - C(N - r, k) / C(N, k), mean over queries."""
    targets = right.shape[1]
    hits = (right > 0).sum(axis=1, keepdims=True)
    taken = np.arange(k)
    return float(1 - np.prod(np.maximum(targets - hits - taken, 0) / (targets - taken), axis=1).mean())

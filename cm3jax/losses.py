"""Losses of the image tokenizer: reconstruction, adversarial terms and the weight between them.

Images are fp32 in [-1, 1]. The adversarial recipe is VQGAN's (Esser et al. 2021, section 3.1 and released code).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reconstruction_loss(
    reconstructions: Float[Array, "B H W C"], images: Float[Array, "B H W C"], l1_weight: float, l2_weight: float
) -> Float[Array, ""]:
    """l1_weight x mean absolute difference + l2_weight x mean squared difference."""
    difference = reconstructions - images
    return l1_weight * jnp.mean(jnp.abs(difference)) + l2_weight * jnp.mean(jnp.square(difference))


def psnr(reconstructions: Float[Array, "B H W C"], images: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio of each image in dB; the peak-to-peak range is 2. Equal images give 100 dB."""
    error = jnp.mean(jnp.square(reconstructions - images), axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, 4e-10))


def hinge_discriminator_loss(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """0.5 (mean relu(1 - D(real)) + mean relu(1 + D(fake))), on the discriminator's logits."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def generator_loss(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """-mean D(fake)."""
    return -jnp.mean(fake)


def adaptive_weight(
    reconstruction_gradient: Float[Array, "..."], adversarial_gradient: Float[Array, "..."]
) -> Float[Array, ""]:
    """clamp(|grad reconstruction| / (|grad adversarial| + 1e-4), 0, 1e4), both at the decoder's last kernel.

    Balances the adversarial term against the reconstruction; no gradient passes through it.
    """
    ratio = _norm(reconstruction_gradient) / (_norm(adversarial_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))


def _norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jnp.square(x)))

"""Vector quantisation: nearest code, straight-through gradient, codebook statistics, revival of dead codes."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cm3jax.parallel.specs import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What the quantiser makes of latents.

    Attributes:
      z_q: the codes' vectors, with the gradient of the latents.
      codes: index of the nearest code at each position.
      loss: codebook term + beta x commitment term (mean over all elements).
    """

    z_q: Float[Array, "B h w E"]
    codes: Int[Array, "B h w"]
    loss: Float[Array, ""]


class VectorQuantizer(nnx.Module):
    """Nearest neighbour in L2 among `codes` learned vectors of `dim` dimensions (van den Oord et al. 2017).

    The loss is |z_q - sg(z)|^2 + beta |sg(z_q) - z|^2. With `legacy_beta` beta multiplies the first term, the
    codebook's, as in the released checkpoints of the VQGAN family. With `l2_normalized` latents and codes are compared,
    and the codes passed on, as unit vectors (Yu et al. 2021).
    """

    def __init__(self, codes: int, dim: int, *, beta: float, legacy_beta: bool, l2_normalized: bool, rngs: nnx.Rngs):
        self.beta, self.legacy_beta, self.l2_normalized = beta, legacy_beta, l2_normalized
        table = jax.random.uniform(rngs.params(), (codes, dim), jnp.float32, -1 / codes, 1 / codes)
        self.embedding = nnx.Param(table, spec="codebook")

    def __call__(self, latents: Float[Array, "B h w E"]) -> Quantized:
        z = self._scaled(latents.astype(jnp.float32))
        codebook = self._codebook()
        codes = nearest_codes(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
        z_q = codebook[codes]
        codebook_term = jnp.mean(jnp.square(z_q - jax.lax.stop_gradient(z)))
        commitment_term = jnp.mean(jnp.square(jax.lax.stop_gradient(z_q) - z))
        if self.legacy_beta:
            loss = self.beta * codebook_term + commitment_term
        else:
            loss = codebook_term + self.beta * commitment_term
        return Quantized(z + jax.lax.stop_gradient(z_q - z), codes, loss)

    def lookup(self, codes: Int[Array, "B h w"]) -> Float[Array, "B h w E"]:
        """The vectors of `codes`."""
        return self._codebook()[codes]

    def _codebook(self) -> Float[Array, "K E"]:
        # Whole on every device: rows of a sharded table cannot be looked up in place.
        return self._scaled(constrain(self.embedding[...], "embedding_lookup"))

    def _scaled(self, vectors: Float[Array, "... E"]) -> Float[Array, "... E"]:
        if not self.l2_normalized:
            return vectors
        return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vectors), -1, keepdims=True), 1e-24))


def nearest_codes(latents: Float[Array, "... E"], codebook: Float[Array, "K E"]) -> Int[Array, "..."]:
    """Index of the nearest row of `codebook`, the lowest one of equals.

    |z|^2 is the same for every code and left out. The product runs at the highest precision: a bf16 pass, which
    accelerators take by default, would change codes.
    """
    products = jnp.einsum("...e,ke->...k", latents, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(codebook), -1) - 2 * products, axis=-1).astype(jnp.int32)


def code_counts(codes: Int[Array, "..."], size: int) -> Float[Array, " K"]:
    """How often each of `size` codes occurs."""
    return jnp.zeros(size, jnp.float32).at[codes.reshape(-1)].add(1.0)


def perplexity(counts: Float[Array, " K"]) -> Float[Array, ""]:
    """exp of the entropy of the codes' frequencies: K if all codes are equally used, 1 if only one is."""
    shares = counts / jnp.maximum(jnp.sum(counts), 1.0)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))


def usage_share(counts: Float[Array, " K"]) -> Float[Array, ""]:
    """Share of the codes that occur at all."""
    return jnp.mean(counts > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Revival:
    """The codebook after dead codes were moved.

    Attributes:
      codebook: with the dead codes moved.
      idle: updates since each code was last used or moved.
      dead: which codes were moved.
    """

    codebook: Float[Array, "K E"]
    idle: Int[Array, " K"]
    dead: Bool[Array, " K"]


def revive(
    codebook: Float[Array, "K E"],
    idle: Int[Array, " K"],
    counts: Float[Array, " K"],
    latents: Float[Array, "B h w E"],
    key: PRNGKeyArray,
    window: int,
) -> Revival:
    """Moves each code that no latent chose for `window` updates onto a latent of this batch, drawn by `key`.

    Latents are drawn without replacement where there are enough, so that no two codes are moved to one place. A dead
    code has had no gradient for the whole window, so its Adam moments have faded and need no reset. A latent that is
    not finite moves nothing.

    Args:
      idle: updates since each code was last used or moved, before this update.
      counts: use of each code in this update.
    """
    idle = jnp.where(counts > 0, 0, idle + 1)
    pool = jax.lax.stop_gradient(latents).astype(codebook.dtype).reshape(-1, codebook.shape[1])
    rows = jax.random.choice(key, len(pool), (len(codebook),), replace=len(pool) < len(codebook))
    dead = (idle >= window) & jnp.all(jnp.isfinite(pool[rows]), axis=-1)
    return Revival(jnp.where(dead[:, None], pool[rows], codebook), jnp.where(dead, 0, idle), dead)

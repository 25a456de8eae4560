"""Cross-entropy over a large vocabulary without ever holding the logits of all tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm3jax.parallel.specs import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Attributes:
    nll: negative log-likelihood of each target in nats, unweighted.
    loss_sum: sum of weight * (nll + z_loss * log_z^2); divide by `weight_sum` for the mean.
    weight_sum: sum of the weights.
    """

    nll: Float[Array, " N"]
    loss_sum: Float[Array, ""]
    weight_sum: Float[Array, ""]


def reference_cross_entropy(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float = 0.0,
) -> CrossEntropy:
    """-log softmax(hidden unembedding^T)[target], plus z_loss * log_z^2 (PaLM, arXiv 2204.02311, section 5)."""
    nll, log_z = _nll(hidden, unembedding, targets)
    weights = weights.astype(jnp.float32)
    return CrossEntropy(nll, jnp.sum(weights * (nll + z_loss * jnp.square(log_z))), jnp.sum(weights))


def cross_entropy(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> CrossEntropy:
    """`reference_cross_entropy`, `chunk` tokens at a time: memory for logits is [chunk, V], forward and backward.

    Args:
      hidden: in the compute dtype, to which `unembedding` is cast; logits and sums are fp32.
      chunk: tokens at a time; a multiple of the devices that share the batch.
    """
    tokens = hidden.shape[0]
    if tokens <= chunk:
        return reference_cross_entropy(hidden, unembedding, targets, weights, z_loss)
    steps = -(-tokens // chunk)

    # Step j takes tokens j, j + steps, j + 2 steps, ...: each device that holds a run of tokens has its share of every
    # chunk, which contiguous chunks would not give.
    def split(x):
        padded = jnp.pad(x, [(0, steps * chunk - tokens), *[(0, 0)] * (x.ndim - 1)])
        return jnp.swapaxes(padded.reshape(chunk, steps, *x.shape[1:]), 0, 1)

    @jax.checkpoint
    def one(piece):
        part = reference_cross_entropy(piece[0], unembedding, piece[1], piece[2], z_loss)
        return part.nll, part.loss_sum

    nll, loss_sums = jax.lax.map(one, (split(hidden), split(targets), split(weights)))
    nll = jnp.swapaxes(nll, 0, 1).reshape(-1)[:tokens]
    return CrossEntropy(nll, jnp.sum(loss_sums), jnp.sum(weights.astype(jnp.float32)))


def _nll(
    hidden: Float[Array, "N D"], unembedding: Float[Array, "V D"], targets: Int[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    logits = jnp.einsum("nd,vd->nv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = constrain(logits, "logits")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: the vocabulary may be split over devices.
    is_target = jnp.arange(unembedding.shape[0]) == targets[:, None]
    return log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), log_z

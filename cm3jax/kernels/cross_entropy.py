"""Cross-entropy over a large vocabulary without ever holding the logits of all tokens.

One pass over chunks of tokens gives the loss and its gradients together, so logits are computed once. On a mesh each
device keeps its own tokens and its own part of the vocabulary: what travels for a chunk is three numbers a token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cm3jax.parallel.specs import ACTIVATIONS, BATCH, WEIGHTS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Attributes:
    nll: negative log-likelihood of each target in nats, unweighted; no gradient flows through it.
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
    logits = _logits(hidden, unembedding)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    weights = weights.astype(jnp.float32)
    return CrossEntropy(
        jax.lax.stop_gradient(nll), jnp.sum(weights * (nll + z_loss * jnp.square(log_z))), jnp.sum(weights)
    )


def cross_entropy(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> CrossEntropy:
    """`reference_cross_entropy`, `chunk` tokens at a time: memory for logits is [chunk, V] over all devices.

    Args:
      hidden: in the compute dtype, to which `unembedding` is cast; logits and sums are fp32.
      chunk: tokens at a time, of all devices that share the batch.

    Raises:
      ValueError: tokens, vocabulary or width that the mesh does not divide.
    """
    weights = weights.astype(jnp.float32)
    loss_sum, nll = _cross_entropy(hidden, unembedding, targets, weights, z_loss, chunk)
    return CrossEntropy(jax.lax.stop_gradient(nll), loss_sum, jnp.sum(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, " N"]]:
    loss, nll, _ = _on_mesh(hidden, unembedding, targets, weights, z_loss, chunk, with_gradients=False)
    return jnp.sum(weights * loss), nll


def _forward(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float,
    chunk: int,
) -> tuple[Any, Any]:
    loss, nll, (d_hidden, d_unembedding) = _on_mesh(hidden, unembedding, targets, weights, z_loss, chunk, True)
    return (jnp.sum(weights * loss), nll), (d_hidden, d_unembedding.astype(unembedding.dtype), loss)


def _backward(z_loss: float, chunk: int, gradients: Any, cotangents: Any) -> Any:
    scale, _ = cotangents
    d_hidden, d_unembedding, d_weights = ((scale * g).astype(g.dtype) for g in gradients)
    return d_hidden, d_unembedding, None, d_weights


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float,
    chunk: int,
    with_gradients: bool,
) -> tuple[Float[Array, " N"], Float[Array, " N"], tuple[Any, ...]]:
    """Loss and nll of each token, and the gradients of the weighted sum if asked for."""
    run = functools.partial(_local, z_loss=z_loss, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    arguments = (hidden, unembedding.astype(hidden.dtype), targets, weights)
    if mesh.empty:
        return run(*arguments, chunk=chunk, on_mesh=False)
    rows, shape = mesh.size // mesh.shape["tensor"], (hidden.shape[0], *unembedding.shape)
    if shape[0] % rows or shape[1] % mesh.shape["tensor"] or shape[2] % mesh.shape["fsdp"]:
        raise ValueError(
            f"cross-entropy: {shape[0]} tokens, a vocabulary of {shape[1]} and a width of {shape[2]}, expected "
            f"multiples of {rows}, {mesh.shape['tensor']} and {mesh.shape['fsdp']} on mesh {dict(mesh.shape)}"
        )
    tokens = P(BATCH)
    gradients = (P(BATCH, None), WEIGHTS["embedding"]) if with_gradients else ()
    return jax.shard_map(
        functools.partial(run, chunk=max(chunk // rows, 1), on_mesh=True),
        in_specs=(P(BATCH, None), ACTIVATIONS["unembedding"], tokens, tokens),
        out_specs=(tokens, tokens, gradients),
        check_vma=False,
    )(*arguments)


def _local(
    hidden: Float[Array, "n D"],
    unembedding: Float[Array, "v D"],
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    *,
    z_loss: float,
    chunk: int,
    with_gradients: bool,
    on_mesh: bool,
) -> tuple[Float[Array, " n"], Float[Array, " n"], tuple[Any, ...]]:
    """The tokens of one device, with its part of the vocabulary."""
    part = unembedding.shape[0]
    targets = targets - jax.lax.axis_index("tensor") * part if on_mesh else targets
    over_vocabulary = _Reductions("tensor" if on_mesh else None)

    def one(d_unembedding: Any, piece: Any) -> tuple[Any, Any]:
        hidden, targets, weights = piece
        logits = _logits(hidden, unembedding)
        nll, log_z = _nll(logits, targets, over_vocabulary)
        found = (nll + z_loss * jnp.square(log_z), nll)
        if not with_gradients:
            return None, found
        shares = jnp.exp(logits - log_z[:, None]) * (1 + 2 * z_loss * log_z)[:, None]
        is_target = jnp.arange(part) == targets[:, None]
        d_logits = (weights[:, None] * (shares - is_target)).astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,vd->nd", d_logits, unembedding, preferred_element_type=jnp.float32)
        d_chunk = jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return d_unembedding + d_chunk, (*found, d_hidden)

    tokens = hidden.shape[0]
    steps = -(-tokens // chunk)
    size = -(-tokens // steps)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, steps * size - tokens), *[(0, 0)] * (x.ndim - 1)])
        return padded.reshape(steps, size, *x.shape[1:])

    start = jnp.zeros(unembedding.shape, jnp.float32) if with_gradients else None
    d_unembedding, found = jax.lax.scan(one, start, (split(hidden), split(targets), split(weights)))
    loss, nll, *rest = (x.reshape(-1, *x.shape[2:])[:tokens] for x in found)
    if not with_gradients:
        return loss, nll, ()
    d_hidden = over_vocabulary.sum(rest[0]).astype(hidden.dtype)
    if on_mesh:
        d_unembedding = jax.lax.psum(d_unembedding, ("replica", "data"))
        d_unembedding = jax.lax.psum_scatter(d_unembedding, "fsdp", scatter_dimension=1, tiled=True)
    return loss, nll, (d_hidden, d_unembedding)


@dataclasses.dataclass(frozen=True)
class _Reductions:
    """Over the devices along a mesh axis; nothing to do without one."""

    axis: str | None

    def sum(self, x: Array) -> Array:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def max(self, x: Array) -> Array:
        return x if self.axis is None else jax.lax.pmax(x, self.axis)


def _logits(hidden: Float[Array, "N D"], unembedding: Float[Array, "V D"]) -> Float[Array, "N V"]:
    return jnp.einsum("nd,vd->nv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _nll(
    logits: Float[Array, "n v"], targets: Int[Array, " n"], over_vocabulary: _Reductions
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Of each token, and the logarithm of its denominator; targets may lie in another device's part."""
    largest = over_vocabulary.max(jnp.max(logits, axis=-1))
    log_z = largest + jnp.log(over_vocabulary.sum(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)))
    here = (targets >= 0) & (targets < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[:, None], axis=-1)[:, 0]
    return log_z - over_vocabulary.sum(jnp.where(here, own, 0.0)), log_z

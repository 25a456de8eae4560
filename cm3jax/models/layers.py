"""Parts of a transformer block that act on one token at a time: initialisers, norms, rotation, feed-forward."""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cm3jax.models.config import TransformerConfig
from cm3jax.models.remat import ACTIVATION
from cm3jax.parallel.specs import constrain

Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


def truncated_normal(key: jax.Array, shape: tuple[int, ...], std: float, cut: float) -> Float[Array, "..."]:
    """Normal(0, std) restricted to `cut` standard deviations, not rescaled (CM3Leon, section 3.2)."""
    return std * jax.random.truncated_normal(key, -cut, cut, shape, jnp.float32)


def weight(config: TransformerConfig, rngs: nnx.Rngs, shape: tuple[int, ...], spec: str) -> nnx.Param:
    """A trainable matrix whose sharding is named `spec`."""
    return nnx.Param(truncated_normal(rngs.params(), shape, config.init_std, config.init_cut), spec=spec)


def residual_weight(config: TransformerConfig, rngs: nnx.Rngs, shape: tuple[int, ...], spec: str) -> nnx.Param:
    """The matrix that ends a residual branch: zero at first if the config says so."""
    if config.zero_init_residual:
        return nnx.Param(jnp.zeros(shape), spec=spec)
    return weight(config, rngs, shape, spec)


def bias(config: TransformerConfig, shape: tuple[int, ...]) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape), spec="replicated") if config.bias else None


def add_bias(x: Float[Array, "..."], b: nnx.Param | None) -> Float[Array, "..."]:
    return x if b is None else x + b[...].astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, in fp32; parameters of shape `shape`, which ends with that axis."""

    def __init__(self, kind: str, shape: tuple[int, ...], eps: float):
        self.centred = kind != "rmsnorm"
        self.eps = eps
        self.scale = None if kind == "layernorm_plain" else nnx.Param(jnp.ones(shape), spec="replicated")
        self.bias = nnx.Param(jnp.zeros(shape), spec="replicated") if kind == "layernorm" else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


def rotation(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """Cosines and sines [B, T, 1, head_dim / 2] of the rotary angles (RoFormer, arXiv 2104.09864, eq. 15)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H K"], by: Rotation) -> Float[Array, "B T H K"]:
    """Turns each pair (x[i], x[i + K/2]): the split-halves order of the Hugging Face checkpoints."""
    cos, sin = by
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Projection(Protocol):
    """A matrix in a form that is not trained, see `generate.weights`."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """What the outputs' axis of `project` is cut into."""

    def project(self, x: Float[Array, "N inputs"]) -> Float[Array, "N outputs"]:
        """x times the matrix."""


def project(x: Float[Array, "B L ..."], w: nnx.Param | Projection) -> Float[Array, "B L ..."]:
    """What stands behind [B, L] in `x` times the matrix `w`, whose first axes are the same and whose others are new.

    As one product of two matrices: the gradient of `w` is then one too, for which nothing is transposed in memory.
    """
    flat = x.reshape(math.prod(x.shape[:2]), -1)
    if not isinstance(w, nnx.Param):
        return w.project(flat).reshape(*x.shape[:2], *w.outputs)
    inputs, matrix = x.ndim - 2, w[...].astype(x.dtype)
    found = flat @ matrix.reshape(flat.shape[1], -1)
    return found.reshape(*x.shape[:2], *matrix.shape[inputs:])


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0), whose gradient asks its result rather than x: what the backward pass reads anyway is all it needs."""
    return _kept_relu(x)


def _kept_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return checkpoint_name(jnp.maximum(x, 0), ACTIVATION)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    result = _kept_relu(primals[0])
    return result, jnp.where(result > 0, tangents[0], 0)


class FeedForward(nnx.Module):
    """down(act(up(x))), or down(silu(gate(x)) * up(x)) for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        d_model, d_ff = config.d_model, config.d_ff
        self.gate = weight(config, rngs, (d_model, d_ff), "mlp_up") if config.activation == "swiglu" else None
        self.up = weight(config, rngs, (d_model, d_ff), "mlp_up")
        self.up_bias = bias(config, (d_ff,))
        self.down = residual_weight(config, rngs, (d_ff, d_model), "mlp_down")
        self.down_bias = bias(config, (d_model,))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        up = constrain(add_bias(project(x, self.up), self.up_bias), "hidden")
        if self.gate is not None:
            hidden = jax.nn.silu(constrain(project(x, self.gate), "hidden")) * up
        elif self.activation == "gelu":
            hidden = jax.nn.gelu(up)
        else:
            hidden = relu(up)
        return add_bias(project(hidden, self.down), self.down_bias)

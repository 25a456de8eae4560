"""Multi-head self-attention with grouped keys, over the sequence itself or over a cache of what came before."""

from typing import Protocol, Self

from flax import nnx
from jaxtyping import Array, Float, Int

from cm3jax.kernels.attention import Mask, attention
from cm3jax.models.config import TransformerConfig
from cm3jax.models.layers import Norm, Rotation, add_bias, bias, project, residual_weight, rotate, weight
from cm3jax.parallel.specs import constrain


class Cache(Protocol):
    """Keys and values of the tokens so far, of every layer; a pytree."""

    def attend(
        self,
        layer: int,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
        positions: Int[Array, "B T"],
    ) -> tuple[Self, Float[Array, "B T H K"]]:
        """Stores k and v in the slots `positions` of `layer`, then lets q see the slots up to its own."""


class SelfAttention(nnx.Module):
    """Projections, optional query-key norm and rotation, attention, output projection."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.backend = config.attention_backend
        d_model, heads, groups, width = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.query = weight(config, rngs, (d_model, heads, width), "qkv")
        self.key = weight(config, rngs, (d_model, groups, width), "qkv")
        self.value = weight(config, rngs, (d_model, groups, width), "qkv")
        self.out = residual_weight(config, rngs, (heads, width, d_model), "attention_out")
        self.query_bias = bias(config, (heads, width))
        self.key_bias = bias(config, (groups, width))
        self.value_bias = bias(config, (groups, width))
        self.out_bias = bias(config, (d_model,))
        self.query_norm = Norm("layernorm", (heads, width), config.norm_eps) if config.qk_norm else None
        self.key_norm = Norm("layernorm", (groups, width), config.norm_eps) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        rotation: Rotation | None,
        cache: Cache | None,
        layer: int | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q = _project(x, self.query, self.query_bias)
        k = _project(x, self.key, self.key_bias)
        v = _project(x, self.value, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is None:
            mixed = attention(q, k, v, mask, self.backend)
        else:
            assert mask.positions is not None and layer is not None
            cache, mixed = cache.attend(layer, q, k, v, mask.positions)
        mixed = constrain(mixed, "heads")
        out = project(mixed, self.out)
        return add_bias(out, self.out_bias), cache


def _project(x: Float[Array, "B T D"], w: nnx.Param, b: nnx.Param | None) -> Float[Array, "B T H K"]:
    return constrain(add_bias(project(x, w), b), "heads")

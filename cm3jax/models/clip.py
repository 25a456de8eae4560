"""CLIP: an image and a text encoder with one space of features (Radford et al. 2021, arXiv 2103.00020).

Pictures enter in [-1, 1] and are normalised as the released models expect; features are fp32 and not yet of length 1.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from cm3jax.kernels.attention import Mask, attention
from cm3jax.models.clip_config import CLIPConfig, TowerConfig
from cm3jax.models.layers import Norm, add_bias, project
from cm3jax.parallel.specs import constrain

# Of the released models, for pixels in [0, 1].
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
EPS = 1e-5
# Similarities start at 1 / 0.07 and are never scaled by more than 100 (section 2.5).
FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0
# SigLIP's first scale and bias (arXiv 2303.15343, section 3.2).
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0


class CLIP(nnx.Module):
    """Both encoders and the scale of their similarities."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = ImageEncoder(config, rngs)
        self.text = TextEncoder(config, rngs)
        scale = SIGMOID_SCALE if config.bias else FIRST_SCALE
        self.logit_scale = nnx.Param(jnp.asarray(math.log(scale)), spec="replicated")
        self.logit_bias = nnx.Param(jnp.asarray(SIGMOID_BIAS), spec="replicated") if config.bias else None

    def encode_images(
        self, images: Float[Array, "B S S 3"], kept: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B E"]:
        """Features of pictures in [-1, 1], or of the patches `kept` of each (numbers in raster order)."""
        return self.image(images, kept)

    def encode_texts(self, rows: Int[Array, "B context"]) -> Float[Array, "B E"]:
        """Features of rows of ids, each with an `end_id`."""
        return self.text(rows)

    def scale(self) -> Float[Array, ""]:
        """What cosines are multiplied with."""
        return jnp.minimum(jnp.exp(self.logit_scale[...]), MAX_SCALE)


class ImageEncoder(nnx.Module):
    """Vision transformer; the feature is that of the class token."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        width, side = config.image.d_model, config.patch_size
        self.config = config
        self.patches = _normal(rngs, (side, side, 3, width), (3 * side * side) ** -0.5, "conv")
        self.class_token = _normal(rngs, (width,), width**-0.5, "replicated")
        self.position_table = _normal(rngs, (config.patches + 1, width), width**-0.5, "positions")
        self.pre_norm = _norm(width)
        self.layers = _stack(config.image, config.activation, rngs)
        self.norm = _norm(width)
        self.projection = _normal(rngs, (width, config.embed_dim), width**-0.5, "dense")

    def __call__(self, images: Float[Array, "B S S 3"], kept: Int[Array, "B K"] | None = None) -> Float[Array, "B E"]:
        size, side = self.config.image_size, self.config.patch_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"clip: pictures of shape {images.shape[1:]}, expected {(size, size, 3)}")
        x = ((images * 0.5 + 0.5 - MEAN) / DEVIATION).astype(self.config.dtype)
        cells = x.reshape(len(x), size // side, side, size // side, side, 3)
        x = jnp.einsum("bhpwqc,pqcd->bhwd", cells, self.patches[...].astype(x.dtype))
        places = self.position_table[...].astype(x.dtype)
        x = x.reshape(len(x), -1, x.shape[-1]) + places[1:]
        if kept is not None:
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype) + places[0], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        x = self.pre_norm(constrain(x, "residual"))
        # Every place looks from the last position, from where all are seen.
        everywhere = Mask(jnp.full((1, x.shape[1]), x.shape[1] - 1))
        x = _run(self.layers, x, everywhere)[:, 0]
        return _project(self.norm(x), self.projection)


class TextEncoder(nnx.Module):
    """Causal transformer; the feature is that of the first `end_id`, so what stands behind it has no effect."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        width = config.text.d_model
        self.config = config
        self.embedding = _normal(rngs, (config.vocab_size, width), 0.02, "embedding")
        self.position_table = _normal(rngs, (config.context, width), 0.01, "positions")
        self.layers = _stack(config.text, config.activation, rngs)
        self.norm = _norm(width)
        self.projection = _normal(rngs, (width, config.embed_dim), width**-0.5, "dense")

    def __call__(self, rows: Int[Array, "B context"]) -> Float[Array, "B E"]:
        if rows.shape[1] != self.config.context:
            raise ValueError(f"clip: rows of {rows.shape[1]} ids, expected {self.config.context}")
        table = constrain(self.embedding[...], "embedding_lookup")
        x = (table[rows] + self.position_table[...]).astype(self.config.dtype)
        x = _run(self.layers, constrain(x, "residual"), Mask(jnp.arange(rows.shape[1])[None]))
        ends = jnp.argmax(rows == self.config.end_id, axis=1)
        x = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
        return _project(self.norm(x), self.projection)


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, with biases."""

    def __init__(self, tower: TowerConfig, activation: str, rngs: nnx.Rngs):
        width, heads = tower.d_model, tower.n_heads
        self.activation = activation
        # As released: branches end the smaller, the more of them are summed.
        out_std = width**-0.5 * (2 * tower.n_layers) ** -0.5
        self.attention_norm, self.mlp_norm = _norm(width), _norm(width)
        self.query, self.key, self.value = (
            _normal(rngs, (width, heads, width // heads), width**-0.5, "qkv") for _ in range(3)
        )
        self.query_bias, self.key_bias, self.value_bias = (_zeros((heads, width // heads)) for _ in range(3))
        self.out = _normal(rngs, (heads, width // heads, width), out_std, "attention_out")
        self.out_bias = _zeros((width,))
        self.up = _normal(rngs, (width, 4 * width), (2 * width) ** -0.5, "mlp_up")
        self.up_bias = _zeros((4 * width,))
        self.down = _normal(rngs, (4 * width, width), out_std, "mlp_down")
        self.down_bias = _zeros((width,))

    def __call__(self, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        x = constrain(x + self._attend(self.attention_norm(x), mask), "residual")
        h = constrain(add_bias(project(self.mlp_norm(x), self.up), self.up_bias), "hidden")
        h = h * jax.nn.sigmoid(1.702 * h) if self.activation == "quick_gelu" else jax.nn.gelu(h, approximate=False)
        return constrain(x + add_bias(project(h, self.down), self.down_bias), "residual")

    def _attend(self, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        q, k, v = (
            constrain(add_bias(project(x, w), b), "heads")
            for w, b in ((self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias))
        )
        mixed = constrain(attention(q, k, v, mask), "heads")
        return add_bias(project(mixed, self.out), self.out_bias)


def normalised(features: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Features of length 1."""
    # Bounded below inside the root: at 0 the gradient of the root would be infinite.
    return features * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(features), axis=-1, keepdims=True), 1e-24))


def with_params(config: CLIPConfig, params: Any) -> CLIP:
    """The encoder of trained parameters, a nested dict as checkpoints hold it."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: CLIP(config, nnx.Rngs(0)))), params)


def _stack(tower: TowerConfig, activation: str, rngs: nnx.Rngs) -> Layer:
    """All layers in one, every array with a leading axis of n_layers."""
    return nnx.vmap(lambda keys: Layer(tower, activation, keys))(rngs.split(tower.n_layers))


def _run(layers: Layer, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
    return jax.lax.scan(lambda x, layer: (layer(x, mask), None), x, layers)[0]


def _project(x: Float[Array, "B D"], projection: nnx.Param) -> Float[Array, "B E"]:
    features = jnp.matmul(x, projection[...].astype(x.dtype), preferred_element_type=jnp.float32)
    return constrain(features, "features")


def _norm(width: int) -> Norm:
    return Norm("layernorm", (width,), EPS)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: str) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), spec=spec)


def _zeros(shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape), spec="replicated")

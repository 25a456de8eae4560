"""Attribute reader: a small convolutional network that tells the attributes of a picture, one softmax each."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cm3jax.parallel.specs import constrain

STRIDE = 16  # of the last feature map


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Attributes and width of a reader.

    Attributes:
      attributes: (name, values) of each attribute; the values are the classes, in order.
      image_size: side of the pictures, pixels; a multiple of 16.
      channels: of the first layer; later layers have two and four times as many.
      hidden: features that all attributes are told from.
      dtype: of the computation; weights are fp32.
    """

    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    image_size: int = 64
    channels: int = 32
    hidden: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.image_size % STRIDE or self.image_size < STRIDE:
            raise ValueError(f"reader image_size: {self.image_size}, expected a multiple of {STRIDE}")
        if not self.attributes or any(len(values) < 2 for _, values in self.attributes):
            raise ValueError(f"reader attributes: expected at least one, each of two values, found {self.attributes}")


class Reader(nnx.Module):
    """Convolutions down to a coarse grid, then dense layers on the whole grid, which keep where things are."""

    def __init__(self, config: ReaderConfig, rngs: nnx.Rngs):
        self.config = config
        c = config.channels
        grid = config.image_size // STRIDE
        shapes = [(3, c, 2), (c, 2 * c, 2), (2 * c, 2 * c, 2), (2 * c, 2 * c, 1), (2 * c, 4 * c, 2)]
        self.convs = nnx.List([_conv(c_in, c_out, stride, config, rngs) for c_in, c_out, stride in shapes])
        self.norms = nnx.List([_norm(c_out, config, rngs) for _, c_out, _ in shapes])
        self.hidden = _dense(grid * grid * 4 * c, config.hidden, "mlp_up", config, rngs)
        self.heads = nnx.List(
            [_dense(config.hidden, len(values), "replicated", config, rngs) for _, values in config.attributes]
        )

    def __call__(self, images: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B classes"], ...]:
        """Logits of each attribute, in the order of the config, for pictures in [-1, 1]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = constrain(jax.nn.relu(norm(conv(x))), "images")
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return tuple(head(x).astype(jnp.float32) for head in self.heads)


def _conv(features_in: int, features_out: int, stride: int, config: ReaderConfig, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        features_in,
        features_out,
        (3, 3),
        strides=stride,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.he_normal(),
        kernel_metadata={"spec": "conv" if features_out % 32 == 0 else "replicated"},
        rngs=rngs,
    )


def _norm(features: int, config: ReaderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(features, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _dense(features_in: int, features_out: int, spec: str, config: ReaderConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        features_in, features_out, dtype=jnp.dtype(config.dtype), kernel_metadata={"spec": spec}, rngs=rngs
    )

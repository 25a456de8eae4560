"""Attribute reader: a small convolutional network that tells the attributes of a picture, one softmax each."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cm3jax.parallel.specs import constrain, conv_spec

STRIDE = 8  # of the feature map


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Attributes and width of a reader.

    Attributes:
      attributes: (name, values) of each attribute; the values are the classes, in order.
      image_size: side of the pictures, pixels; a multiple of 8.
      channels: of the first layer; even. The feature map has twice as many.
      hidden: features that all attributes are told from.
      dtype: of the computation; weights are fp32.
    """

    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    image_size: int = 64
    channels: int = 64
    hidden: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.image_size % STRIDE or self.image_size < STRIDE:
            raise ValueError(f"reader image_size: {self.image_size}, expected a multiple of {STRIDE}")
        if self.channels % 2 or self.channels < 2:
            raise ValueError(f"reader channels: {self.channels}, expected an even number")
        if not self.attributes or any(len(values) < 2 for _, values in self.attributes):
            raise ValueError(f"reader attributes: expected at least one, each of two values, found {self.attributes}")


class Reader(nnx.Module):
    """Three convolutions; then what is where (the whole map) and what is anywhere (its maximum) tell the attributes.

    The first kernel is wide and its stride 4, because layers at full resolution would cost most of the time on a CPU.
    """

    def __init__(self, config: ReaderConfig, rngs: nnx.Rngs):
        self.config = config
        c, cells = config.channels, (config.image_size // STRIDE) ** 2
        self.stem = _Layer(3, c, 8, 4, config, rngs)
        self.down = _Layer(c, 2 * c, 3, 2, config, rngs)
        self.mix = _Layer(2 * c, 2 * c, 3, 1, config, rngs)
        self.where = _Layer(2 * c, c // 2, 1, 1, config, rngs)
        self.anywhere = _Layer(2 * c, 4 * c, 1, 1, config, rngs)
        self.hidden = _dense(cells * c // 2 + 4 * c, config.hidden, "dense", config, rngs)
        self.norm = nnx.LayerNorm(config.hidden, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.heads = nnx.List(
            [_dense(config.hidden, len(values), "replicated", config, rngs) for _, values in config.attributes]
        )

    def __call__(self, images: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B classes"], ...]:
        """Logits of each attribute, in the order of the config, for pictures in [-1, 1]."""
        x = self.down(self.stem(images))
        x = x + self.mix(x)
        found = [self.where(x).reshape(x.shape[0], -1), self.anywhere(x).max(axis=(1, 2))]
        x = jax.nn.relu(self.norm(self.hidden(jnp.concatenate(found, axis=-1))))
        return tuple(head(x).astype(jnp.float32) for head in self.heads)


def with_params(config: ReaderConfig, params: Any) -> Reader:
    """The reader of trained parameters, a nested dict as checkpoints hold it."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Reader(config, nnx.Rngs(0)))), params)


class _Layer(nnx.Module):
    """relu(norm(conv(x))), normalised over the whole map: pixel by pixel, it would amplify the noise of flat areas."""

    def __init__(
        self, features_in: int, features_out: int, kernel: int, stride: int, config: ReaderConfig, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            features_in,
            features_out,
            (kernel, kernel),
            strides=stride,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            kernel_init=nnx.initializers.he_normal(),
            kernel_metadata={"spec": conv_spec(features_in, features_out)},
            rngs=rngs,
        )
        self.norm = nnx.GroupNorm(features_out, 1, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return constrain(jax.nn.relu(self.norm(self.conv(x))), "images")


def _dense(features_in: int, features_out: int, spec: str, config: ReaderConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        features_in, features_out, dtype=jnp.dtype(config.dtype), kernel_metadata={"spec": spec}, rngs=rngs
    )

"""PatchGAN discriminator (Isola et al. 2017): a logit for each overlapping patch of the image."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cm3jax.parallel.specs import constrain, conv_spec

NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of the discriminator.

    Attributes:
      channels: width of the first layer; doubles with each layer, up to eight times.
      layers: convolutions of stride 2; 3 give patches of 70 x 70 pixels.
      dtype: of the computation; weights are fp32.
    """

    channels: int = 64
    layers: int = 3
    dtype: Literal["float32", "bfloat16"] = "float32"


class BatchNorm(nnx.Module):
    """Normalises by the statistics of the (global) batch at hand.

    There are no running averages: the discriminator runs in training only, where they are never read, so it stays a
    pure function of its weights and its input.
    """

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(1.0 + 0.02 * jax.random.normal(rngs.params(), (features,)), spec="replicated")
        self.bias = nnx.Param(jnp.zeros(features), spec="replicated")

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(centered), axis=(0, 1, 2))
        normalized = centered * jax.lax.rsqrt(variance + NORM_EPSILON)
        return (normalized * self.scale[...] + self.bias[...]).astype(x.dtype)


class Discriminator(nnx.Module):
    """4x4 convolutions: `layers` of stride 2, one of stride 1, the logits; BatchNorm and leaky ReLU 0.2 between."""

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        self.conv_in = _conv(3, widths[0], 2, True, config, rngs)
        strides = [2] * (config.layers - 1) + [1]
        self.convs = nnx.List(
            [_conv(widths[i], widths[i + 1], stride, False, config, rngs) for i, stride in enumerate(strides)]
        )
        self.norms = nnx.List([BatchNorm(width, rngs) for width in widths[1:]])
        self.conv_out = _conv(widths[-1], 1, 1, True, config, rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
        """Logits, fp32: high for patches that look real."""
        x = nnx.leaky_relu(self.conv_in(constrain(images, "images")), 0.2)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = constrain(nnx.leaky_relu(norm(layer(x)), 0.2), "images")
        return self.conv_out(x).astype(jnp.float32)


def _conv(
    features_in: int, features_out: int, stride: int, bias: bool, config: DiscriminatorConfig, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        features_in,
        features_out,
        (4, 4),
        strides=stride,
        padding=((1, 1), (1, 1)),
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"spec": conv_spec(features_in, features_out)},
        rngs=rngs,
    )

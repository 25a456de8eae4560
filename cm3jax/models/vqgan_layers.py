"""Building blocks of the convolutional image tokenizer: residual block, attention, resampling, patches.

Images and feature maps are `[B, H, W, C]`. Names of modules follow the published checkpoints of the family, so that a
converter is a table of names.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cm3jax.parallel.specs import constrain, conv_spec

NORM_EPSILON = 1e-6

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the initialisation that the published recipes were tuned with.
_conv_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(
    features_in: int, features_out: int, kernel: int, *, dtype: str, rngs: nnx.Rngs, stride: int = 1, padding="SAME"
) -> nnx.Conv:
    """A convolution with bias."""
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        dtype=jnp.dtype(dtype),
        kernel_init=_conv_init,
        kernel_metadata={"spec": conv_spec(features_in, features_out)},
        rngs=rngs,
    )


def group_norm(features: int, groups: int, *, dtype: str, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(features, groups, epsilon=NORM_EPSILON, dtype=jnp.dtype(dtype), rngs=rngs)


class ResBlock(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, features_in: int, features_out: int, groups: int, *, dtype: str, rngs: nnx.Rngs):
        self.norm1 = group_norm(features_in, groups, dtype=dtype, rngs=rngs)
        self.conv1 = conv(features_in, features_out, 3, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(features_out, groups, dtype=dtype, rngs=rngs)
        self.conv2 = conv(features_out, features_out, 3, dtype=dtype, rngs=rngs)
        if features_in != features_out:
            self.nin_shortcut = conv(features_in, features_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h = self.conv1(jax.nn.swish(self.norm1(x)))
        h = self.conv2(jax.nn.swish(self.norm2(h)))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return constrain(shortcut + h, "images")


class AttentionBlock(nnx.Module):
    """x + single-head self-attention over all positions, scale C^-0.5; softmax in fp32."""

    def __init__(self, features: int, groups: int, *, dtype: str, rngs: nnx.Rngs):
        self.norm = group_norm(features, groups, dtype=dtype, rngs=rngs)
        self.q = conv(features, features, 1, dtype=dtype, rngs=rngs)
        self.k = conv(features, features, 1, dtype=dtype, rngs=rngs)
        self.v = conv(features, features, 1, dtype=dtype, rngs=rngs)
        self.proj_out = conv(features, features, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, features = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).reshape(batch, height * width, features) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * features**-0.5
        weights = jax.nn.softmax(scores).astype(v.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return constrain(x + self.proj_out(h), "images")


class Downsample(nnx.Module):
    """3x3 convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, features: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = conv(features, features, 3, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Each position repeated 2x2, then a 3x3 convolution."""

    def __init__(self, features: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv = conv(features, features, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, features: int, groups: int, *, dtype: str, rngs: nnx.Rngs):
        self.block_1 = ResBlock(features, features, groups, dtype=dtype, rngs=rngs)
        self.attn_1 = AttentionBlock(features, groups, dtype=dtype, rngs=rngs)
        self.block_2 = ResBlock(features, features, groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.block_2(self.attn_1(self.block_1(x)))


def space_to_depth(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B H/p W/p p*p*C"]:
    """Each `patch` x `patch` square of pixels becomes one position; channels ordered (row, column, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, patch * patch * channels)


def depth_to_space(x: Float[Array, "B h w p*p*C"], patch: int) -> Float[Array, "B h*p w*p C"]:
    """Inverse of `space_to_depth`."""
    batch, height, width, depth = x.shape
    channels = depth // (patch * patch)
    x = x.reshape(batch, height, width, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * patch, width * patch, channels)

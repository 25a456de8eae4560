"""The image tokenizer: a convolutional VQGAN (Esser et al. 2021) between pixels and a grid of codes.

Sizes follow three published tokenizers: 256 px to 32 x 32 codes (Make-A-Scene, used by CM3Leon), 512 px to 32 x 32
(Chameleon) and 256 px to 16 x 16. `stem_patch` turns squares of pixels into channels before the first convolution and
back after the last one, which makes small models affordable on a CPU.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cm3jax.models.quantizer import Quantized, VectorQuantizer
from cm3jax.models.vqgan_layers import (
    AttentionBlock,
    Downsample,
    MidBlock,
    ResBlock,
    Upsample,
    conv,
    depth_to_space,
    group_norm,
    space_to_depth,
)
from cm3jax.parallel.specs import constrain


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Shape of the tokenizer.

    Attributes:
      resolution: side of the training images, pixels.
      channels: width of the finest level.
      channel_multipliers: width of each level, in `channels`; each level but the last halves the side.
      res_blocks: residual blocks of each level of the encoder; the decoder has one more.
      attention_resolutions: sides of feature maps whose residual blocks are followed by attention.
      z_channels: width of the encoder's output.
      embed_dim: dimensions of a code.
      codes: size of the codebook.
      beta: weight of the commitment term.
      legacy_beta: beta on the codebook term instead, as in the released checkpoints of the family.
      l2_normalized: compare latents and codes as unit vectors.
      norm_groups: groups of every GroupNorm.
      stem_patch: side of the pixel squares that become channels; 1 keeps pixels.
      dtype: of the computation; weights and the quantiser are fp32.
      remat: recompute residual and attention blocks in the backward pass.
    """

    resolution: int
    channels: int
    channel_multipliers: tuple[int, ...]
    codes: int
    res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    z_channels: int = 256
    embed_dim: int = 256
    beta: float = 0.25
    legacy_beta: bool = False
    l2_normalized: bool = False
    norm_groups: int = 32
    stem_patch: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        if self.resolution % self.downsampling:
            raise ValueError(f"resolution {self.resolution} is not a multiple of the down-sampling {self.downsampling}")
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.norm_groups:
                raise ValueError(f"{self.channels * multiplier} channels do not divide into {self.norm_groups} groups")

    @property
    def downsampling(self) -> int:
        """Pixels along the side of one code."""
        return self.stem_patch * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes along the side of one image of `resolution` pixels."""
        return self.resolution // self.downsampling

    @property
    def tokens(self) -> int:
        """Codes of one image."""
        return self.grid**2


PRESETS = {
    "f8_256": VQGANConfig(
        256, 128, (1, 1, 2, 4), codes=8192, attention_resolutions=(32,), dtype="bfloat16", remat=True
    ),
    "f16_512": VQGANConfig(512, 128, (1, 1, 2, 2, 4), codes=8192, dtype="bfloat16", remat=True),
    "f16_256": VQGANConfig(
        256, 128, (1, 1, 2, 2, 4), codes=16384, attention_resolutions=(16,), dtype="bfloat16", remat=True
    ),
    "scenes": VQGANConfig(
        64, 64, (1,), codes=512, res_blocks=1, z_channels=64, embed_dim=16, norm_groups=16, stem_patch=8
    ),
    "tiny": VQGANConfig(16, 8, (1, 2), codes=16, res_blocks=1, z_channels=8, embed_dim=4, norm_groups=4, stem_patch=2),
}


class Level(nnx.Module):
    """The blocks of one resolution; `attn` is as long as `block`, or empty."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool, config: VQGANConfig, rngs: nnx.Rngs):
        options: dict[str, Any] = {"groups": config.norm_groups, "dtype": config.dtype, "rngs": rngs}
        self.remat = config.remat
        self.block = nnx.List([ResBlock(width_in, width_out, **options) for width_in, width_out in widths])
        self.attn = nnx.List([AttentionBlock(width_out, **options) for _, width_out in widths if attention])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        for i, block in enumerate(self.block):
            x = _apply(block, x, self.remat)
            if self.attn:
                x = _apply(self.attn[i], x, self.remat)
        return x


class DownLevel(Level):
    """A level of the encoder; every one but the coarsest halves the side in the end."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool, last: bool, config: VQGANConfig, rngs: nnx.Rngs):
        super().__init__(widths, attention, config, rngs)
        self.downsample = None if last else Downsample(widths[-1][1], dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = super().__call__(x)
        return self.downsample(x) if self.downsample else x


class UpLevel(Level):
    """A level of the decoder; every one but the finest doubles the side in the end."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool, last: bool, config: VQGANConfig, rngs: nnx.Rngs):
        super().__init__(widths, attention, config, rngs)
        self.upsample = None if last else Upsample(widths[-1][1], dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        x = super().__call__(x)
        return self.upsample(x) if self.upsample else x


class Encoder(nnx.Module):
    """Images to latents before `quant_conv`."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        self.patch, self.remat = config.stem_patch, config.remat
        self.conv_in = conv(3 * self.patch**2, config.channels, 3, **options)
        width, side = config.channels, config.resolution // self.patch
        levels: list[Level] = []
        for i, multiplier in enumerate(config.channel_multipliers):
            width_out = config.channels * multiplier
            widths = [(width, width_out)] + [(width_out, width_out)] * (config.res_blocks - 1)
            last = i == len(config.channel_multipliers) - 1
            levels.append(DownLevel(widths, side in config.attention_resolutions, last, config, rngs))
            width, side = width_out, side // 2
        self.down = nnx.List(levels)
        self.mid = MidBlock(width, config.norm_groups, **options)
        self.norm_out = group_norm(width, config.norm_groups, **options)
        self.conv_out = conv(width, config.z_channels, 3, **options)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w Z"]:
        x = self.conv_in(space_to_depth(images, self.patch))
        for level in self.down:
            x = level(x)
        x = _apply(self.mid, x, self.remat)
        return self.conv_out(jax.nn.swish(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` to images. `up[0]` is the finest level and runs last."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        self.patch, self.remat = config.stem_patch, config.remat
        width, side = config.channels * config.channel_multipliers[-1], config.grid
        levels: list[Level] = []
        self.conv_in = conv(config.z_channels, width, 3, **options)
        self.mid = MidBlock(width, config.norm_groups, **options)
        for i, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            width_out = config.channels * multiplier
            widths = [(width, width_out)] + [(width_out, width_out)] * config.res_blocks
            levels.append(UpLevel(widths, side in config.attention_resolutions, i == 0, config, rngs))
            width, side = width_out, side * 2
        self.up = nnx.List(reversed(levels))
        self.norm_out = group_norm(width, config.norm_groups, **options)
        self.conv_out = conv(width, 3 * self.patch**2, 3, **options)

    def __call__(self, z: Float[Array, "B h w Z"]) -> Float[Array, "B H W 3"]:
        x = _apply(self.mid, self.conv_in(z), self.remat)
        for level in reversed(list(self.up)):
            x = level(x)
        return depth_to_space(self.conv_out(jax.nn.swish(self.norm_out(x))), self.patch)


class VQGAN(nnx.Module):
    """Encoder, quantiser and decoder. Images are fp32 in [-1, 1], `[B, H, W, 3]`; the decoder may exceed the range.

    Any side that is a multiple of `config.downsampling` works; the weights are those of `config.resolution`.
    """

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.quantize = VectorQuantizer(
            config.codes,
            config.embed_dim,
            beta=config.beta,
            legacy_beta=config.legacy_beta,
            l2_normalized=config.l2_normalized,
            rngs=rngs,
        )
        self.quant_conv = conv(config.z_channels, config.embed_dim, 1, dtype=config.dtype, rngs=rngs)
        self.post_quant_conv = conv(config.embed_dim, config.z_channels, 1, dtype=config.dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], Quantized]:
        """Reconstruction, and what the quantiser made of the latents."""
        quantized = self.quantize(self.encode(images))
        return self.decode(quantized.z_q), quantized

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w E"]:
        """Latents, fp32, before quantisation.

        Raises:
          ValueError: the images' sides are not multiples of `config.downsampling`.
        """
        if images.shape[1] % self.config.downsampling or images.shape[2] % self.config.downsampling:
            raise ValueError(f"image sides {images.shape[1:3]} are not multiples of {self.config.downsampling}")
        return self.quant_conv(self.encoder(constrain(images, "images"))).astype(jnp.float32)

    def decode(self, z_q: Float[Array, "B h w E"]) -> Float[Array, "B H W 3"]:
        """Images, fp32, from quantised latents."""
        return constrain(self.decoder(self.post_quant_conv(z_q)).astype(jnp.float32), "images")

    def encode_codes(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        """Codes of each image in raster order, N = h * w."""
        return self.quantize(self.encode(images)).codes.reshape(len(images), -1)

    def decode_codes(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Square images from codes in raster order.

        Raises:
          ValueError: N is not a square number.
        """
        side = math.isqrt(codes.shape[1])
        if side * side != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes do not form a square image")
        return self.decode(self.quantize.lookup(codes.reshape(-1, side, side)))


def _apply(module: nnx.Module, x: Float[Array, "B H W C"], remat: bool) -> Float[Array, "B H W D"]:
    run = jax.checkpoint(lambda module, x: module(x)) if remat else lambda module, x: module(x)
    return run(module, x)

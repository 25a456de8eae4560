"""A perceptual hash of pictures, and where nearly the same pictures meet.

The hash is the sign of the 128 lowest frequencies of the picture's discrete cosine transform (Zauner 2010,
"Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1, there with 64 bits and the median
in the place of zero). Scaling, compression and brightness hardly move these signs; a crop moves those of weak
frequencies.

Nearly the same pictures are looked for by locality-sensitive hashing: the lowest 100 bits are cut into five bands of
twenty, and two pictures are compared only where a band agrees. A picture also asks at the bands that it would have if
some of the four weakest signs of a band were the other ones (multi-probe: Lv et al. 2007, "Multi-Probe LSH"). Hashes
that differ in fewer than five bits always meet.
"""

import dataclasses
import itertools

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float64, Int, UInt8, UInt64

BITS = 128
BANDS = 5
BAND_BITS = 20
PROBED_BITS = 4  # of each band: 16 places to ask at

_SIDE = 32  # pixels a side that the transform sees
_DIGITS = 3  # rounding that makes signs of zero the same on every machine
_COLOR_GRID = 2
# Levels of 255. Brightness changes of a fifth move the colour of real photographs by up to 14.
COLOR_DISTANCE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class ImageHash:
    """What is compared of a picture.

    Attributes:
      bits: the 128 signs, packed.
      color: mean Cb and Cr of the four quarters: pictures that differ in colour alone are different pictures.
      bands: the number of each band.
      probes: for each band, the numbers to ask at; the first is the band's own.
    """

    bits: UInt64[np.ndarray, " 2"]
    color: UInt8[np.ndarray, " 8"]
    bands: Int[np.ndarray, " bands"]
    probes: Int[np.ndarray, "bands probes"]


def image_hash(pixels: UInt8[np.ndarray, "H W 3"]) -> ImageHash:
    """The hash of a picture of any size."""
    ycbcr = PIL.Image.fromarray(pixels).convert("YCbCr")
    grey = np.asarray(ycbcr.getchannel("Y").resize((_SIDE, _SIDE), PIL.Image.Resampling.LANCZOS), np.float64)
    strength = np.round(_DCT @ grey @ _DCT.T, _DIGITS)[_ORDER]
    positive = strength > 0
    grid = ycbcr.resize((_COLOR_GRID, _COLOR_GRID), PIL.Image.Resampling.BOX)
    probes = _probes(positive[: BANDS * BAND_BITS], np.abs(strength[: BANDS * BAND_BITS]))
    return ImageHash(
        bits=np.packbits(positive).view(np.uint64),
        color=np.asarray(grid)[..., 1:].reshape(-1),
        bands=probes[:, 0],
        probes=probes,
    )


def bands_of(bits: UInt64[np.ndarray, " 2"]) -> Int[np.ndarray, " bands"]:
    """`ImageHash.bands` of `ImageHash.bits`."""
    return _numbers(np.unpackbits(bits.view(np.uint8))[: BANDS * BAND_BITS].astype(bool).reshape(BANDS, BAND_BITS))


def near(
    bits: UInt64[np.ndarray, " 2"],
    color: UInt8[np.ndarray, " 8"],
    others_bits: UInt64[np.ndarray, "N 2"],
    others_color: UInt8[np.ndarray, "N 8"],
    distance: int,
) -> Bool[np.ndarray, " N"]:
    """Which of N pictures are nearly the same as one: at most `distance` other bits, and nearly the same colours."""
    same_shape = np.bitwise_count(bits ^ others_bits).sum(1) <= distance
    return same_shape & (np.abs(color.astype(np.int16) - others_color).max(1) <= COLOR_DISTANCE)


def _probes(
    positive: Bool[np.ndarray, " bits"], strength: Float64[np.ndarray, " bits"]
) -> Int[np.ndarray, "bands probes"]:
    own = positive.reshape(BANDS, BAND_BITS)
    weakest = np.argsort(strength.reshape(BANDS, BAND_BITS), axis=1, kind="stable")[:, :PROBED_BITS]
    flips = np.array(list(itertools.product((0, 1), repeat=PROBED_BITS)))  # the first flips nothing
    return _numbers(own)[:, None] ^ ((1 << weakest) @ flips.T)


def _numbers(bands: Bool[np.ndarray, "bands bits"]) -> Int[np.ndarray, " bands"]:
    return bands @ (1 << np.arange(BAND_BITS))


def _dct_matrix(size: int) -> Float64[np.ndarray, "size size"]:
    """The orthonormal type-II transform; row k is frequency k."""
    frequency, place = np.indices((size, size))
    matrix = np.cos(np.pi * (2 * place + 1) * frequency / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def _lowest_frequencies(count: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Rows and columns of the `count` lowest frequencies after the mean, by the sum of both."""
    rows, columns = np.indices((_SIDE, _SIDE)).reshape(2, -1)
    order = np.lexsort((rows, rows + columns))[1 : count + 1]
    return rows[order], columns[order]


_DCT = _dct_matrix(_SIDE)
_ORDER = _lowest_frequencies(BITS)

"""Regions of a picture, painted as a mask, as the codes that they cover."""

import math

import numpy as np
from jaxtyping import Bool, UInt8

from cm3jax.tokens.image import fit

PAINTED = 128


def unknown_codes(
    mask: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], resolution: int, image_tokens: int
) -> Bool[np.ndarray, " N"]:
    """True for each code whose square of the picture has a painted (bright) pixel, in raster order.

    Args:
      mask: white where the picture is to be drawn anew.
      size: height and width of the picture that the mask is of.
      resolution: of the image tokenizer; the mask is cut and resized as the picture is.

    Raises:
      ValueError: a mask of another size than the picture, or with nothing painted.
    """
    if mask.shape[:2] != size:
        height, width = mask.shape[:2]
        raise ValueError(f"a mask of {width} x {height} pixels for a picture of {size[1]} x {size[0]}")
    painted = fit(np.where(mask >= PAINTED, 255, 0).astype(np.uint8), resolution).max(axis=-1) >= PAINTED
    side = math.isqrt(image_tokens)
    cell = resolution // side
    cells = painted.reshape(side, cell, side, cell).any(axis=(1, 3))
    if not cells.any():
        raise ValueError("a mask with nothing painted: white is what is drawn anew")
    return cells.reshape(-1)


def whole_rows(unknown: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """The same, with every row of codes that has an unknown one unknown from end to end."""
    side = math.isqrt(len(unknown))
    rows = unknown.reshape(side, side).any(axis=1)
    return np.repeat(rows, side)

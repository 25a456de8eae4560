"""Images as arrays: bounded decoding, fitting to a square, and the value range of models."""

import io
from typing import TypeVar

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

Pixels = TypeVar("Pixels", np.ndarray, jax.Array)

MAX_PIXELS = 1 << 26  # 67 megapixels: 200 MB decoded
FORMATS = ("PNG", "JPEG", "WEBP")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class ImageTooLargeError(ValueError):
    """An image with more pixels than the caller allows."""


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes PNG, JPEG or WebP (its first frame) to RGB, upright by EXIF, alpha blended on white.

    The size is read from the header and checked before any pixel is decoded.

    Raises:
      ImageTooLargeError: more than `max_pixels` pixels.
      ValueError: not an image of these formats, damaged or cut short.
    """
    try:
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
                return np.array(_upright(_to_rgb(image), _orientation(image)), dtype=np.uint8)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"image too large: {error}") from error
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"not a {'/'.join(FORMATS)} image ({len(content)} bytes)") from error
    except Exception as error:  # the decoders raise many types on damaged bytes, and the bytes are a stranger's
        raise ValueError(f"damaged image: {error}") from error
    raise ImageTooLargeError(f"image too large: {width} x {height}, expected at most {max_pixels} pixels")


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey instead of scaling it
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a picture with unreadable EXIF is still a picture
        return 1


def _upright(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def fit(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The centre square, resized with Lanczos: short side to `size` and centre crop in one step.

    Only the square is computed, so that a picture of extreme shape costs no more than another.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels.copy()
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    square = PIL.Image.fromarray(pixels).resize(
        (size, size), PIL.Image.Resampling.LANCZOS, box=(left, top, left + short, top + short)
    )
    return np.array(square)


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The pixels as a PNG file's bytes."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def to_float(pixels: UInt8[Pixels, "*shape"]) -> Float32[Pixels, "*shape"]:
    """Bytes to [-1, 1]; of NumPy's arrays or JAX's."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(values: Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] to bytes, rounded and clipped; inverse of `to_float` on its values."""
    return np.clip(np.rint((np.asarray(values, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)

"""Image bytes to arrays: bounded, upright, on white."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from cm3jax.tokens.image import ImageTooLargeError, decode_image, encode_png, fit, to_float, to_uint8

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_round_trips_exactly():
    np.testing.assert_array_equal(decode_image(encode_png(PICTURE)), PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(kind):
    smooth = np.add.outer(np.arange(32) * 4, np.arange(48) * 2)[..., None].repeat(3, -1).astype(np.uint8)
    decoded = decode_image(saved(PIL.Image.fromarray(smooth), kind, quality=95))
    assert decoded.shape == smooth.shape
    assert np.abs(decoded.astype(int) - smooth).mean() < 4  # the codecs' loss at quality 95


def test_alpha_is_blended_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    decoded = decode_image(saved(PIL.Image.fromarray(rgba), "PNG"))
    assert decoded[0, :, 0].tolist() == [255, 127, 0]


def test_palette_with_transparency_is_blended_on_white():
    image = PIL.Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(saved(image, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes_become_rgb(mode):
    assert decode_image(saved(PIL.Image.fromarray(PICTURE).convert(mode), "PNG")).shape == PICTURE.shape


def test_cmyk_jpeg_becomes_rgb():
    red = PIL.Image.new("RGB", (8, 8), (200, 30, 30)).convert("CMYK")
    decoded = decode_image(saved(red, "JPEG", quality=95))
    assert decoded.shape == (8, 8, 3) and decoded[..., 0].mean() > decoded[..., 1].mean() + 100


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = PIL.Image.fromarray(np.array([[0, 256, 32_768, 65_535]], np.uint16))
    assert decode_image(saved(grey, "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    stored = PIL.Image.fromarray(PICTURE)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    expected = {
        1: PICTURE, 2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1], 5: PICTURE.transpose(1, 0, 2),
        6: PICTURE[::-1].transpose(1, 0, 2), 7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: PICTURE[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(decode_image(saved(stored, "PNG", exif=exif)), expected)


def test_the_size_is_checked_before_decoding():
    with pytest.raises(ImageTooLargeError, match="9 x 6, expected at most 53 pixels"):
        decode_image(encode_png(PICTURE), max_pixels=53)
    assert decode_image(encode_png(PICTURE), max_pixels=54).shape == (6, 9, 3)


@pytest.mark.parametrize("side", [9_000, 60_000])  # beyond our limit; beyond Pillow's own too
def test_bomb_is_refused_by_its_header(side):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(ImageTooLargeError, match="image too large"):
        decode_image(bomb)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_damaged(kind):
    content = saved(PIL.Image.fromarray(PICTURE.repeat(20, 0).repeat(20, 1)), kind)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match="damaged image"):
            decode_image(content[: int(share * len(content))])


def test_other_bytes_and_formats_are_no_images():
    with pytest.raises(ValueError, match="not a PNG/JPEG/WEBP image"):
        decode_image(b"hello")
    with pytest.raises(ValueError, match="not a PNG/JPEG/WEBP image"):
        decode_image(saved(PIL.Image.fromarray(PICTURE), "TIFF"))


def test_fit_takes_the_centre_square():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (fit(wide, 20) == 200).all()
    assert abs(int(fit(wide, 10)[5, 5, 0]) - 200) <= 1
    np.testing.assert_array_equal(fit(wide.transpose(1, 0, 2), 10), fit(wide, 10).transpose(1, 0, 2))


def test_fit_leaves_what_fits_and_bounds_extreme_shapes():
    square = PICTURE[:6, :6]
    np.testing.assert_array_equal(fit(square, 6), square)
    assert fit(np.zeros((1, 100_000, 3), np.uint8), 64).shape == (64, 64, 3)


def test_value_ranges_are_inverse():
    values = np.arange(256, dtype=np.uint8)
    floats = to_float(values)
    assert floats.dtype == np.float32 and (floats[0], floats[-1]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(floats), values)
    assert to_uint8(np.array([-7.0, 7.0], np.float32)).tolist() == [0, 255]

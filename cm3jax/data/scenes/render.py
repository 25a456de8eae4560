"""Painting: shapes to pixels, one canvas for the picture and the same canvas for every truth map."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from cm3jax.data.scenes.drawing import Drawing, draw
from cm3jax.data.scenes.shapes import Ellipse, Gradient, Polygon, Shape, Stroke
from cm3jax.data.scenes.space import Scene

LEAST_SIZE, GREATEST_SIZE = 16, 1024
CANVAS = 256  # canvases below this are painted larger and reduced, against jagged edges
ROUND_FROM = 4.0  # canvas pixels: the ends of thinner strokes do not show

Ink = int | tuple[int, int, int]


def check_size(size: int) -> None:
    """Raises a ValueError unless pictures of this size can be drawn."""
    if not LEAST_SIZE <= size <= GREATEST_SIZE:
        raise ValueError(f"scene size: {size} pixels, expected {LEAST_SIZE} to {GREATEST_SIZE}")


def supersampling(size: int) -> int:
    """How many canvas pixels stand for one picture pixel, on each axis."""
    return max(2, CANVAS // size)


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The picture of a scene, anti-aliased; the same picture at every size (16 to 1024 pixels)."""
    return render_drawing(draw(scene), size)


def render_drawing(drawing: Drawing, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The picture of a drawing."""
    canvas = paint(drawing, size, "RGB", [_fills(shape) for shape in drawing.shapes])
    return np.asarray(canvas.reduce(supersampling(size)))


def _fills(shape: Shape) -> tuple[Ink, Ink]:
    return shape.fill, shape.fill_bottom if isinstance(shape, Gradient) else shape.fill


def paint(drawing: Drawing, size: int, mode: str, inks: Sequence[tuple[Ink, Ink]]) -> Image.Image:
    """Paints every shape on a supersampled canvas.

    Args:
      drawing: what to paint.
      size: of the picture, in pixels.
      mode: of the canvas, "RGB", "L" or "I".
      inks: per shape, what to paint it with at its upper and lower edge; only a `Gradient` runs from one to the other.

    Raises:
      ValueError: a size that cannot be painted.
    """
    check_size(size)
    side = size * supersampling(size)
    canvas = Image.new(mode, (side, side))
    pen = ImageDraw.Draw(canvas)
    for shape, (ink, ink_below) in zip(drawing.shapes, inks, strict=True):
        match shape:
            case Ellipse():
                pen.ellipse([side * v for v in shape.box], fill=ink)
            case Polygon():
                pen.polygon([(side * x, side * y) for x, y in shape.points], fill=ink)
            case Stroke():
                _stroke(pen, shape, side, ink)
            case Gradient():
                _gradient(canvas, shape, ink, ink_below)
    return canvas


def _stroke(pen: ImageDraw.ImageDraw, shape: Stroke, side: int, ink: Ink) -> None:
    points = [(side * x, side * y) for x, y in shape.points]
    width = max(side * shape.width, 1.0)
    pen.line(points, fill=ink, width=round(width))
    if width >= ROUND_FROM:
        r = width / 2
        for x, y in points:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)


def _gradient(canvas: Image.Image, shape: Gradient, top: Ink, bottom: Ink) -> None:
    side = canvas.width
    y0, y1 = round(side * shape.top), round(side * shape.bottom)
    share = (np.arange(y1 - y0, dtype=np.float32) + 0.5)[:, None] / (y1 - y0)
    column = np.round(np.atleast_1d(top) + (np.atleast_1d(bottom) - np.atleast_1d(top)) * share)
    if canvas.mode == "RGB":
        strip = Image.fromarray(column.astype(np.uint8)[:, None])
    else:
        strip = Image.fromarray(column.astype(np.int32)).convert(canvas.mode)
    canvas.paste(strip.resize((side, y1 - y0), Image.Resampling.NEAREST), (0, y0))

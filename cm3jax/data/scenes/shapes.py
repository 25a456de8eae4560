"""Resolution-independent shapes, and the pen that places a drawing's own coordinates in the picture.

Picture coordinates run from (0, 0), top left, to (1, 1), bottom right. A drawing's own coordinates have y up: it stands
on y = 0 and is about one high and one wide around x = 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

RGB = tuple[int, int, int]
Point = tuple[float, float]

CLASSES = ("sky", "ground", "water", "mountain", "building", "plant", "subject", "item")
OUTLINE: RGB = (30, 24, 34)


class Surface(NamedTuple):
    """What a shape belongs to: its class of `CLASSES` and its distance, 0 at the viewer to 1 at the sky."""

    label: int
    depth: float


def surface(name: str, depth: float) -> Surface:
    """The surface of a class given by name; a `ValueError` for a name that is not in `CLASSES`."""
    return Surface(CLASSES.index(name), depth)


class Polygon(NamedTuple):
    """A filled polygon."""

    points: tuple[Point, ...]
    fill: RGB
    surface: Surface


class Ellipse(NamedTuple):
    """A filled ellipse in the box (x0, y0, x1, y1)."""

    box: tuple[float, float, float, float]
    fill: RGB
    surface: Surface


class Stroke(NamedTuple):
    """A line with round joints and ends."""

    points: tuple[Point, ...]
    width: float
    fill: RGB
    surface: Surface


class Gradient(NamedTuple):
    """A band over the whole width from `top` to `bottom`, colour and depth changing linearly."""

    top: float
    bottom: float
    fill: RGB
    fill_bottom: RGB
    surface: Surface
    depth_bottom: float


Shape = Polygon | Ellipse | Stroke | Gradient


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """The colour `share` of the way from `a` to `b`."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


class Pen:
    """Draws in a figure's own coordinates; collects shapes, the dark outlines below all fills.

    Args:
      origin: where the figure's (0, 0) stands in the picture.
      scale: height of the figure's unit, in picture heights.
      flip: mirrors the figure.
      surface: of every shape that this pen draws.
      outline: width of the outline, in the figure's units.
    """

    def __init__(self, origin: Point, scale: float, flip: bool, surface: Surface, outline: float = 0.028):
        self._origin, self._scale, self._sign = origin, scale, -1.0 if flip else 1.0
        self._surface, self._outline = surface, outline
        self._outlines: list[Shape] = []
        self._fills: list[Shape] = []

    @property
    def shapes(self) -> list[Shape]:
        """What was drawn so far, first at the back."""
        return self._outlines + self._fills

    def ellipse(self, center: Point, radii: Point, fill: RGB, outlined: bool = True) -> None:
        (x, y), (rx, ry) = self._place(center), (radii[0] * self._scale, radii[1] * self._scale)
        if outlined:
            o = self._outline * self._scale
            self._outlines.append(Ellipse((x - rx - o, y - ry - o, x + rx + o, y + ry + o), OUTLINE, self._surface))
        self._fills.append(Ellipse((x - rx, y - ry, x + rx, y + ry), fill, self._surface))

    def polygon(self, points: Sequence[Point], fill: RGB, outlined: bool = True) -> None:
        placed = tuple(self._place(p) for p in points)
        if outlined:
            width = 2 * self._outline * self._scale
            self._outlines.append(Stroke((*placed, placed[0]), width, OUTLINE, self._surface))
        self._fills.append(Polygon(placed, fill, self._surface))

    def stroke(self, points: Sequence[Point], width: float, fill: RGB, outlined: bool = True) -> None:
        placed, width = tuple(self._place(p) for p in points), width * self._scale
        if outlined:
            wider = width + 2 * self._outline * self._scale
            self._outlines.append(Stroke(placed, wider, OUTLINE, self._surface))
        self._fills.append(Stroke(placed, width, fill, self._surface))

    def _place(self, point: Point) -> Point:
        return self._origin[0] + self._sign * self._scale * point[0], self._origin[1] - self._scale * point[1]


def bounds(shapes: Sequence[Shape]) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) around all shapes, clipped to the picture."""
    boxes = [_box(shape) for shape in shapes]
    x0, y0, x1, y1 = (list(side) for side in zip(*boxes, strict=True))
    return max(min(x0), 0.0), max(min(y0), 0.0), min(max(x1), 1.0), min(max(y1), 1.0)


def _box(shape: Shape) -> tuple[float, float, float, float]:
    match shape:
        case Ellipse():
            return shape.box
        case Gradient():
            return 0.0, shape.top, 1.0, shape.bottom
        case Polygon() | Stroke():
            grow = shape.width / 2 if isinstance(shape, Stroke) else 0.0
            xs, ys = zip(*shape.points, strict=True)
            return min(xs) - grow, min(ys) - grow, max(xs) + grow, max(ys) + grow

"""The six items that a subject wears or carries."""

from collections.abc import Callable

from cm3jax.data.scenes.shapes import RGB, Pen
from cm3jax.data.scenes.subjects import BLACK, BROWN, WHITE, Anchors

STRAW: RGB = (232, 196, 104)
NEON: RGB = (255, 0, 200)
GLINT: RGB = (0, 255, 220)
STEEL: RGB = (196, 226, 248)
INDIGO: RGB = (84, 40, 150)
LIME: RGB = (160, 240, 50)
GOLD: RGB = (236, 180, 40)
TEAL: RGB = (0, 168, 160)
CREAM: RGB = (255, 244, 200)


def _straw_hat(pen: Pen, at: Anchors) -> None:
    x, y, w = at.head
    pen.polygon([(x - w * 0.46, y), (x - w * 0.34, y + 0.27), (x + w * 0.34, y + 0.27), (x + w * 0.46, y)], STRAW)
    pen.ellipse((x, y), (w * 0.95, 0.085), STRAW)
    pen.stroke([(x - w * 0.38, y + 0.11), (x + w * 0.38, y + 0.11)], 0.085, INDIGO, outlined=False)


def _neon_sunglasses(pen: Pen, at: Anchors) -> None:
    x, y, w = at.eyes
    lens = w * 0.27
    pen.stroke([(x - w * 0.62, y + 0.04), (x + w * 0.62, y + 0.04)], 0.06, NEON, outlined=False)
    for side in (-1, 1):
        center = (x + side * w * 0.32, y)
        pen.ellipse(center, (lens + 0.045, lens * 0.85 + 0.045), NEON)
        pen.ellipse(center, (lens - 0.015, lens * 0.85 - 0.015), BLACK, outlined=False)
        pen.stroke(
            [(center[0] - lens * 0.4, y - lens * 0.1), (center[0] + lens * 0.1, y + lens * 0.4)],
            0.04,
            GLINT,
            outlined=False,
        )


def _stick(pen: Pen, at: Anchors) -> None:
    x, y = at.mouth
    pen.stroke([(x + 0.14, y), (x + 0.28, y + 0.16)], 0.06, BROWN)
    pen.stroke([(x - 0.40, y - 0.03), (x + 0.40, y + 0.03)], 0.11, BROWN)
    for dx, dy in ((0.24, 0.22), (0.38, 0.18), (0.44, 0.05)):
        pen.ellipse((x + dx, y + dy), (0.085, 0.065), LIME)


def _sword(pen: Pen, at: Anchors) -> None:
    x, y = at.hand
    pen.stroke([(x - 0.07, y - 0.13), (x, y)], 0.085, BROWN)
    pen.polygon([(x - 0.05, y + 0.11), (x + 0.11, y + 0.03), (x + 0.40, y + 0.60), (x + 0.38, y + 0.78)], STEEL)
    pen.stroke([(x + 0.05, y + 0.10), (x + 0.34, y + 0.66)], 0.03, WHITE, outlined=False)
    pen.stroke([(x - 0.14, y + 0.13), (x + 0.18, y - 0.03)], 0.10, GOLD)


def _scarf(pen: Pen, at: Anchors) -> None:
    x, y, w = at.neck
    pen.stroke([(x + w * 0.30, y), (x + w * 0.42, y - 0.24)], 0.15, TEAL)
    pen.stroke([(x - w * 0.5, y), (x + w * 0.5, y)], 0.16, TEAL)
    for share in (-0.40, -0.08, 0.24):
        pen.stroke([(x + w * share, y - 0.05), (x + w * (share + 0.10), y + 0.05)], 0.055, CREAM, outlined=False)
    pen.stroke([(x + w * 0.36 - 0.04, y - 0.17), (x + w * 0.36 + 0.06, y - 0.16)], 0.05, CREAM, outlined=False)


def _flag(pen: Pen, at: Anchors) -> None:
    x, y = at.hand
    foot, top = y - 0.14, y + 0.78
    wide, high = 0.14, 0.12
    pen.stroke([(x, foot), (x, top)], 0.05, (96, 84, 80))
    pen.polygon([(x, top), (x + 3 * wide, top), (x + 3 * wide, top - 3 * high), (x, top - 3 * high)], WHITE)
    for column, row in ((0, 0), (2, 0), (1, 1), (0, 2), (2, 2)):
        x0, y0 = x + column * wide, top - row * high
        pen.polygon([(x0, y0), (x0 + wide, y0), (x0 + wide, y0 - high), (x0, y0 - high)], BLACK, outlined=False)


_DRAWINGS: dict[str, Callable[[Pen, Anchors], None]] = {
    "straw hat": _straw_hat,
    "neon sunglasses": _neon_sunglasses,
    "stick": _stick,
    "sword": _sword,
    "scarf": _scarf,
    "flag": _flag,
}


def draw_item(pen: Pen, item: str, anchors: Anchors) -> None:
    """Draws an item where it sits on a subject."""
    _DRAWINGS[item](pen, anchors)

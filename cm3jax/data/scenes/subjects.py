"""The nine subjects, each one drawing in its own coordinates with the places where an item can sit."""

import dataclasses
import math
from collections.abc import Callable

from cm3jax.data.scenes.shapes import OUTLINE, RGB, Pen, Point, mix

WHITE: RGB = (250, 250, 250)
BLACK: RGB = (22, 20, 28)
BROWN: RGB = (120, 76, 40)

COLORS: dict[str, RGB] = {
    "red": (222, 36, 38),
    "orange": (250, 138, 16),
    "yellow": (252, 222, 34),
    "green": (44, 172, 58),
    "blue": (34, 88, 232),
    "purple": (132, 48, 190),
    "pink": (255, 132, 196),
    "white": (248, 248, 246),
}

# 3 wide, 5 high; one string per row from the top.
DIGITS: dict[str, tuple[str, str, str, str, str]] = {
    "0": ("###", "#.#", "#.#", "#.#", "###"),
    "1": (".#.", "##.", ".#.", ".#.", "###"),
    "2": ("###", "..#", "###", "#..", "###"),
    "3": ("###", "..#", "###", "..#", "###"),
    "4": ("#.#", "#.#", "###", "..#", "..#"),
    "5": ("###", "#..", "###", "..#", "###"),
    "6": ("###", "#..", "###", "#.#", "###"),
    "7": ("###", "..#", "..#", ".#.", ".#."),
    "8": ("###", "#.#", "###", "#.#", "###"),
    "9": ("###", "#.#", "###", "..#", "###"),
}


@dataclasses.dataclass(frozen=True)
class Tone:
    """A subject's colour with its shade and its light."""

    base: RGB
    dark: RGB
    light: RGB


@dataclasses.dataclass(frozen=True)
class Anchors:
    """Where items sit: a point, with a width where the item is fitted to the body."""

    head: tuple[float, float, float]
    eyes: tuple[float, float, float]
    neck: tuple[float, float, float]
    mouth: Point
    hand: Point


def tone(color: str) -> Tone:
    """The tone of a colour of the attribute table."""
    base = COLORS[color]
    return Tone(base, mix(base, (20, 16, 40), 0.28), mix(base, WHITE, 0.45))


def _eye(pen: Pen, x: float, y: float, r: float = 0.05) -> None:
    pen.ellipse((x, y), (r, r * 1.2), WHITE, outlined=False)
    pen.ellipse((x + r * 0.2, y - r * 0.1), (r * 0.6, r * 0.75), BLACK, outlined=False)


def _cactus(pen: Pen, t: Tone) -> None:
    pen.stroke([(-0.12, 0.30), (-0.38, 0.32), (-0.38, 0.60)], 0.17, t.base)
    pen.stroke([(0.12, 0.40), (0.38, 0.42), (0.38, 0.72)], 0.17, t.base)
    pen.stroke([(0.0, 0.12), (0.0, 0.83)], 0.40, t.base)
    for x in (-0.11, 0.0, 0.11):
        pen.stroke([(x, 0.06), (x, 0.50)], 0.025, t.dark, outlined=False)
    for x in (-0.38, 0.38):
        pen.stroke([(x, 0.44), (x, 0.58)], 0.025, t.dark, outlined=False)
    _eye(pen, -0.09, 0.80)
    _eye(pen, 0.09, 0.80)


def _dog(pen: Pen, t: Tone) -> None:
    for x in (-0.30, -0.16, 0.06, 0.20):
        pen.stroke([(x, 0.32), (x, 0.06)], 0.11, t.base)
    pen.stroke([(-0.36, 0.46), (-0.52, 0.74)], 0.09, t.base)
    pen.ellipse((-0.06, 0.40), (0.36, 0.17), t.base)
    pen.ellipse((0.24, 0.70), (0.22, 0.22), t.base)
    pen.ellipse((0.44, 0.62), (0.15, 0.11), t.light)
    pen.ellipse((0.55, 0.66), (0.055, 0.05), BLACK, outlined=False)
    pen.ellipse((0.06, 0.66), (0.09, 0.20), t.dark)
    _eye(pen, 0.30, 0.77)


def _stop_sign(pen: Pen, t: Tone, year: str) -> None:
    pen.stroke([(0.0, 0.03), (0.0, 0.40)], 0.09, (150, 152, 160))
    corners = [math.radians(22.5 + 45 * k) for k in range(8)]
    for radius, fill in ((0.50, WHITE), (0.44, t.base)):
        pen.polygon([(radius * math.cos(a), 0.56 + radius * math.sin(a)) for a in corners], fill, radius == 0.50)
    ink = BLACK if sum(t.base) > 420 else WHITE
    cell = 0.052
    for place, digit in enumerate(year):
        left = (place - 2) * 4 * cell + 0.5 * cell
        for row, line in enumerate(DIGITS[digit]):
            for start, width in _runs(line):
                x, y = left + start * cell, 0.58 - row * cell
                pen.polygon(
                    [(x, y), (x + width * cell, y), (x + width * cell, y - cell), (x, y - cell)], ink, outlined=False
                )


def _runs(line: str) -> list[tuple[int, int]]:
    """(start, length) of each run of "#"."""
    starts = [i for i, mark in enumerate(line) if mark == "#" and (i == 0 or line[i - 1] != "#")]
    return [(start, len(line[start:].split(".")[0])) for start in starts]


def _coffee_cup(pen: Pen, t: Tone) -> None:
    pen.ellipse((0.0, 0.06), (0.46, 0.07), t.light)
    pen.stroke([(0.26, 0.58), (0.46, 0.57), (0.48, 0.36), (0.40, 0.24), (0.22, 0.24)], 0.09, t.dark)
    pen.polygon([(-0.36, 0.76), (0.36, 0.76), (0.25, 0.08), (-0.25, 0.08)], t.base)
    pen.ellipse((0.0, 0.76), (0.36, 0.10), t.light)
    pen.ellipse((0.0, 0.755), (0.30, 0.07), (84, 46, 20), outlined=False)
    for x in (-0.14, 0.02, 0.18):
        pen.stroke([(x, 0.88), (x + 0.04, 0.96), (x - 0.02, 1.02), (x + 0.02, 1.10)], 0.035, WHITE, outlined=False)
    _eye(pen, -0.10, 0.48)
    _eye(pen, 0.10, 0.48)


def _island(pen: Pen, t: Tone) -> None:
    pen.ellipse((0.0, 0.14), (0.60, 0.15), (72, 186, 240))
    pen.ellipse((0.0, 0.16), (0.51, 0.11), (214, 244, 255), outlined=False)
    hill = [(0.46 * math.cos(a), 0.12 + 0.36 * math.sin(a)) for a in (math.pi * k / 14 for k in range(15))]
    pen.polygon(hill, t.base)
    pen.stroke([(0.08, 0.44), (0.10, 0.66), (0.17, 0.86)], 0.08, BROWN)
    for dx, dy in ((-0.30, -0.06), (-0.22, 0.14), (0.24, 0.12), (0.28, -0.08)):
        tip = (0.17 + dx, 0.86 + dy)
        pen.stroke([(0.17, 0.88), (0.17 + dx * 0.6, 0.90 + dy), tip], 0.085, t.base)
    _eye(pen, -0.10, 0.34)
    _eye(pen, 0.06, 0.34)


def _sheep(pen: Pen, t: Tone) -> None:
    for x in (-0.28, -0.12, 0.06, 0.20):
        pen.stroke([(x, 0.25), (x, 0.05)], 0.085, (58, 50, 56))
    for k in range(9):
        angle = 2 * math.pi * k / 9
        pen.ellipse((-0.06 + 0.27 * math.cos(angle), 0.48 + 0.17 * math.sin(angle)), (0.15, 0.15), t.base)
    pen.ellipse((-0.06, 0.48), (0.30, 0.22), t.base, outlined=False)
    for x, y in ((-0.22, 0.52), (-0.06, 0.42), (0.04, 0.58)):
        pen.stroke([(x - 0.05, y), (x, y - 0.03), (x + 0.05, y)], 0.025, t.dark, outlined=False)
    pen.ellipse((0.36, 0.62), (0.14, 0.19), (58, 50, 56))
    pen.ellipse((0.28, 0.80), (0.15, 0.08), t.base)
    _eye(pen, 0.40, 0.66)


def _turtle(pen: Pen, t: Tone) -> None:
    skin = (176, 196, 112)
    pen.stroke([(0.22, 0.28), (0.42, 0.50)], 0.16, skin)
    pen.ellipse((0.46, 0.58), (0.15, 0.14), skin)
    pen.stroke([(-0.40, 0.16), (-0.52, 0.12)], 0.09, skin)
    for x in (-0.26, 0.14):
        pen.stroke([(x, 0.20), (x, 0.07)], 0.15, skin)
    shell = [(-0.08 + 0.44 * math.cos(a), 0.20 + 0.50 * math.sin(a)) for a in (math.pi * k / 16 for k in range(17))]
    pen.polygon(shell, t.base)
    pen.stroke([(-0.50, 0.20), (0.34, 0.20)], 0.08, t.dark)
    for x, y in ((-0.28, 0.38), (0.12, 0.38), (-0.08, 0.52)):
        pen.ellipse((x, y), (0.09, 0.08), t.dark, outlined=False)
    _eye(pen, 0.50, 0.62)


def _elephant(pen: Pen, t: Tone) -> None:
    for x in (-0.34, -0.12, 0.10):
        pen.stroke([(x, 0.34), (x, 0.10)], 0.19, t.dark if x == -0.12 else t.base)
    pen.ellipse((-0.12, 0.52), (0.40, 0.30), t.base)
    pen.stroke([(0.36, 0.64), (0.51, 0.46), (0.51, 0.20), (0.60, 0.12)], 0.14, t.base)
    pen.ellipse((0.27, 0.70), (0.23, 0.23), t.base)
    pen.stroke([(0.36, 0.50), (0.48, 0.34)], 0.075, WHITE)
    pen.ellipse((0.04, 0.68), (0.21, 0.29), t.dark)
    pen.ellipse((0.05, 0.67), (0.13, 0.20), t.light, outlined=False)
    _eye(pen, 0.34, 0.78)


def _raccoon(pen: Pen, t: Tone) -> None:
    pen.stroke([(-0.18, 0.14), (-0.46, 0.16), (-0.50, 0.50)], 0.17, t.base)
    for y in (0.26, 0.40):
        pen.stroke([(-0.55, y), (-0.43, y)], 0.06, BLACK, outlined=False)
    pen.ellipse((0.0, 0.26), (0.26, 0.26), t.base)
    pen.ellipse((0.0, 0.22), (0.15, 0.18), t.light, outlined=False)
    for side in (-1, 1):
        pen.ellipse((side * 0.14, 0.04), (0.11, 0.05), t.dark)
        pen.polygon([(side * 0.34, 0.98), (side * 0.10, 0.86), (side * 0.32, 0.68)], t.base)
    pen.ellipse((0.0, 0.68), (0.36, 0.25), t.base)
    pen.stroke([(-0.24, 0.70), (-0.08, 0.68), (0.08, 0.68), (0.24, 0.70)], 0.15, BLACK, outlined=False)
    pen.ellipse((0.0, 0.55), (0.11, 0.08), WHITE, outlined=False)
    pen.ellipse((0.0, 0.58), (0.045, 0.04), OUTLINE, outlined=False)
    _eye(pen, -0.13, 0.70, 0.04)
    _eye(pen, 0.13, 0.70, 0.04)


_DRAWINGS: dict[str, tuple[Callable[[Pen, Tone], None], Anchors]] = {
    "cactus": (_cactus, Anchors((0.0, 0.98, 0.40), (0.0, 0.80, 0.42), (0.0, 0.60, 0.40), (0.02, 0.66), (0.40, 0.44))),
    "dog": (_dog, Anchors((0.22, 0.90, 0.40), (0.30, 0.77, 0.40), (0.16, 0.46, 0.30), (0.48, 0.56), (0.50, 0.34))),
    "coffee cup": (
        _coffee_cup,
        Anchors((0.0, 0.84, 0.62), (0.0, 0.50, 0.52), (0.0, 0.26, 0.56), (0.0, 0.36), (0.44, 0.28)),
    ),
    "island": (
        _island,
        Anchors((0.15, 0.93, 0.42), (-0.02, 0.34, 0.46), (0.0, 0.17, 0.84), (0.0, 0.22), (0.40, 0.28)),
    ),
    "sheep": (
        _sheep,
        Anchors((0.30, 0.84, 0.36), (0.38, 0.67, 0.36), (0.26, 0.44, 0.30), (0.42, 0.50), (0.54, 0.36)),
    ),
    "turtle": (
        _turtle,
        Anchors((0.42, 0.70, 0.36), (0.46, 0.60, 0.38), (0.34, 0.36, 0.28), (0.50, 0.50), (0.60, 0.28)),
    ),
    "elephant": (
        _elephant,
        Anchors((0.24, 0.90, 0.44), (0.32, 0.78, 0.42), (0.14, 0.42, 0.36), (0.54, 0.16), (0.56, 0.18)),
    ),
    "raccoon": (
        _raccoon,
        Anchors((0.0, 0.90, 0.50), (0.0, 0.70, 0.52), (0.0, 0.45, 0.44), (0.02, 0.53), (0.42, 0.30)),
    ),
}
_STOP_SIGN = Anchors((0.0, 0.99, 0.56), (0.0, 0.76, 0.58), (0.0, 0.22, 0.40), (0.0, 0.14), (0.52, 0.30))


def draw_subject(pen: Pen, subject: str, color: str, year: str) -> Anchors:
    """Draws a subject (the year on a stop sign only) and says where items sit on it."""
    if subject == "stop sign":
        _stop_sign(pen, tone(color), year)
        return _STOP_SIGN
    drawing, anchors = _DRAWINGS[subject]
    drawing(pen, tone(color))
    return anchors

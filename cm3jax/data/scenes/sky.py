"""The six skies, and the tint each gives to all that lies below it."""

import dataclasses
import math
from collections.abc import Callable

from cm3jax.data.scenes.perspective import horizon
from cm3jax.data.scenes.shapes import RGB, Ellipse, Gradient, Point, Polygon, Shape, Stroke, surface
from cm3jax.data.scenes.space import Layout, Scene

WHITE: RGB = (255, 255, 255)
SKY = surface("sky", 1.0)


@dataclasses.dataclass(frozen=True)
class _Light:
    """Colours of a sky, and how it tints what lies under it."""

    top: RGB
    low: RGB
    tint: RGB


_LIGHTS: dict[str, _Light] = {
    "noon": _Light((40, 140, 250), (170, 220, 255), (255, 255, 255)),
    "sunset": _Light((150, 20, 70), (255, 136, 20), (255, 214, 178)),
    "night": _Light((6, 8, 40), (28, 36, 96), (128, 138, 190)),
    "dawn": _Light((190, 170, 240), (255, 226, 214), (255, 238, 240)),
    "storm": _Light((58, 62, 72), (118, 124, 134), (176, 182, 192)),
    "rainbow": _Light((120, 205, 225), (206, 246, 240), (250, 255, 250)),
}
_RAINBOW: tuple[RGB, ...] = (
    (230, 40, 50),
    (250, 150, 30),
    (250, 230, 60),
    (60, 190, 80),
    (60, 110, 230),
    (150, 70, 200),
)


def tinted(scene: Scene, fill: RGB) -> RGB:
    """A colour of the ground as it looks under the scene's sky."""
    tint = _LIGHTS[scene.sky].tint
    return fill[0] * tint[0] // 255, fill[1] * tint[1] // 255, fill[2] * tint[2] // 255


def draw_sky(scene: Scene) -> list[Shape]:
    """The sky down to the horizon, first at the back."""
    light, layout = _LIGHTS[scene.sky], scene.layout
    deep = horizon(scene)
    x, y = 0.12 + 0.76 * layout.light[0], deep * (0.22 + 0.16 * layout.light[1])
    shapes: list[Shape] = [Gradient(0.0, deep, light.top, light.low, SKY, 1.0)]
    return shapes + _IN_THE_SKY[scene.sky](layout, x, y, deep)


def _disc(x: float, y: float, r: float, fill: RGB) -> Ellipse:
    return Ellipse((x - r, y - r, x + r, y + r), fill, SKY)


def _clouds(layout: Layout, deep: float, fill: RGB) -> list[Shape]:
    shapes: list[Shape] = []
    for cx, cy in layout.clouds[:2]:
        x, y = cx, deep * (0.12 + 0.42 * cy)
        shapes += [
            _disc(x + dx, y + dy, r, fill) for dx, dy, r in ((-0.06, 0.01, 0.035), (0.0, 0.0, 0.05), (0.06, 0.01, 0.04))
        ]
    return shapes


def _noon(layout: Layout, x: float, y: float, deep: float) -> list[Shape]:
    return [_disc(x, y, 0.085, (255, 244, 160)), _disc(x, y, 0.065, (255, 226, 40)), *_clouds(layout, deep, WHITE)]


def _sunset(layout: Layout, x: float, y: float, deep: float) -> list[Shape]:
    return [_disc(x, deep - 0.07, 0.15, (255, 170, 50)), _disc(x, deep - 0.07, 0.11, (255, 236, 110))]


def _night(layout: Layout, x: float, y: float, deep: float) -> list[Shape]:
    stars = [_disc(sx, deep * 0.9 * sy, 0.008, WHITE) for sx, sy in (*layout.ground[:9], *layout.clouds)]
    return [*stars, _disc(x, y, 0.07, (250, 246, 210)), _disc(x + 0.035, y - 0.015, 0.058, (10, 12, 46))]


def _dawn(layout: Layout, x: float, y: float, deep: float) -> list[Shape]:
    rays: list[Shape] = []
    for k in range(7):
        a = math.pi * (k + 0.5) / 7
        tips = [(x + 0.9 * math.cos(a + d), deep - 0.9 * math.sin(a + d)) for d in (-0.09, 0.09)]
        rays.append(Polygon(((x, deep), *tips), (255, 246, 214), SKY))
    return rays


def _storm(layout: Layout, x: float, y: float, deep: float) -> list[Shape]:
    dark: RGB = (44, 46, 56)
    shapes: list[Shape] = [_disc(0.1 + 0.2 * k, 0.02 + 0.03 * (k % 2), 0.10, dark) for k in range(5)]
    bolt = ((0.0, 0.08), (-0.05, 0.45), (0.01, 0.45), (-0.04, 0.85), (0.09, 0.36), (0.03, 0.36), (0.06, 0.08))
    shapes.append(Polygon(tuple((x + dx, deep * dy) for dx, dy in bolt), (255, 240, 80), SKY))
    for rx, ry in layout.ground:
        top = deep * (0.25 + 0.6 * ry)
        shapes.append(Stroke(((rx, top), (rx - 0.02, top + 0.06)), 0.01, (190, 210, 235), SKY))
    return shapes


def _rainbow(layout: Layout, x: float, y: float, deep: float) -> list[Shape]:
    center, radius = 0.3 + 0.4 * layout.light[0], deep * (0.86 + 0.08 * layout.light[1])

    def arc(r: float) -> list[Point]:
        angles = [math.pi * step / 20 for step in range(21)]
        return [(center + 1.25 * r * math.cos(a), deep - r * math.sin(a)) for a in angles]

    arcs = [arc(radius - 0.022 * k) for k in range(len(_RAINBOW) + 1)]
    return [
        Polygon((*outer, *reversed(inner)), fill, SKY)
        for fill, outer, inner in zip(_RAINBOW, arcs, arcs[1:], strict=False)
    ]


_IN_THE_SKY: dict[str, Callable[[Layout, float, float, float], list[Shape]]] = {
    "noon": _noon,
    "sunset": _sunset,
    "night": _night,
    "dawn": _dawn,
    "storm": _storm,
    "rainbow": _rainbow,
}

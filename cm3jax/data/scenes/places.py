"""The eight places where subjects stand."""

import math
from collections.abc import Callable

from cm3jax.data.scenes.perspective import FAR, HORIZON, WATER_LINE, ground_depth
from cm3jax.data.scenes.shapes import RGB, Ellipse, Gradient, Point, Polygon, Shape, Stroke, Surface, mix, surface
from cm3jax.data.scenes.sky import WHITE, tinted
from cm3jax.data.scenes.space import Scene


def draw_place(scene: Scene) -> list[Shape]:
    """What stands on the horizon and the ground (or water) below it, first at the back."""
    return _PLACES[scene.place](scene)


def _plain(scene: Scene, far: RGB, near: RGB, top: float, label: str = "ground", bottom: float = 1.0) -> Gradient:
    far, near = tinted(scene, far), tinted(scene, near)
    depth, depth_bottom = ground_depth(scene, top), ground_depth(scene, bottom)
    return Gradient(top, bottom, far, near, surface(label, depth), depth_bottom)


def _hill(
    scene: Scene, x: float, width: float, height: float, fill: RGB, on: Surface, base: float = HORIZON
) -> Polygon:
    angles = [math.pi * k / 12 for k in range(13)]
    points = tuple((x + width * math.cos(a), base - height * math.sin(a)) for a in angles)
    return Polygon(points, tinted(scene, fill), on)


def _scattered(scene: Scene, top: float) -> list[tuple[float, float, float]]:
    """(x, y, depth) of the details that lie on the ground below `top`."""
    spots = [(x, top + 0.02 + (0.96 - top) * y) for x, y in scene.layout.ground]
    return [(x, y, ground_depth(scene, y)) for x, y in sorted(spots, key=lambda spot: spot[1])]


def _desert(scene: Scene) -> list[Shape]:
    h = scene.layout.hills
    rock = surface("mountain", 0.95)
    shapes: list[Shape] = []
    for x, w in ((0.1 + 0.3 * h[0], 0.14), (0.62 + 0.3 * h[1], 0.11)):
        top = HORIZON - 0.09 - 0.07 * h[2]
        mesa = ((x - w, HORIZON), (x - w * 0.7, top), (x + w * 0.7, top), (x + w, HORIZON))
        shapes.append(Polygon(mesa, tinted(scene, (186, 92, 56)), rock))
    shapes.append(_plain(scene, (226, 172, 92), (246, 206, 130), HORIZON))
    for k, y in enumerate((0.62, 0.80)):
        dune = tuple((t / 10, y + 0.03 * math.sin(6.28 * (t / 10 + h[3 + k]))) for t in range(11))
        shapes.append(Stroke(dune, 0.016, tinted(scene, (206, 146, 72)), surface("ground", ground_depth(scene, y))))
    for x, y, depth in _scattered(scene, HORIZON):
        shapes.append(
            Ellipse(
                (x - 0.012, y - 0.006, x + 0.012, y + 0.006), tinted(scene, (190, 132, 66)), surface("ground", depth)
            )
        )
    return shapes


def _grass(scene: Scene) -> list[Shape]:
    h = scene.layout.hills
    far = surface("ground", 0.95)
    shapes: list[Shape] = [
        _hill(scene, 0.15 + 0.2 * h[0], 0.42, 0.07 + 0.05 * h[1], (92, 168, 70), far),
        _hill(scene, 0.70 + 0.2 * h[2], 0.40, 0.07 + 0.05 * h[3], (78, 152, 62), far),
        _plain(scene, (96, 178, 60), (122, 206, 72), HORIZON),
    ]
    for k, (x, y, depth) in enumerate(_scattered(scene, HORIZON)):
        on, s = surface("plant", depth), 0.6 + y
        for dx in (-0.014, 0.0, 0.014):
            tip = (x + 1.6 * dx * s, y - 0.032 * s)
            shapes.append(Stroke(((x + dx, y), tip), 0.008 * s, tinted(scene, (40, 120, 36)), on))
        if k % 3 == 0:
            petal: RGB = (255, 250, 240) if k % 2 else (255, 226, 80)
            shapes.append(Ellipse((x - 0.014, y - 0.06, x + 0.014, y - 0.032), tinted(scene, petal), on))
    return shapes


def _mountains(scene: Scene) -> list[Shape]:
    h = scene.layout.hills
    on = surface("mountain", 0.95)
    peaks = (
        (0.10 + 0.1 * h[0], 0.26 + 0.08 * h[1]),
        (0.88 - 0.1 * h[2], 0.27 + 0.08 * h[3]),
        (0.42 + 0.16 * h[4], 0.19 + 0.08 * h[5]),
    )
    shapes: list[Shape] = []
    for k, (x, height) in enumerate(peaks):
        top, slope = HORIZON - height, 1.05
        foot: list[Point] = [(x - slope * height, HORIZON + 0.01), (x, top), (x + slope * height, HORIZON + 0.01)]
        shapes.append(Polygon(tuple(foot), tinted(scene, mix((112, 110, 140), (86, 84, 112), k / 2)), on))
        c = 0.36 * height
        cap: list[Point] = [
            (x, top),
            (x + slope * c, top + c),
            (x + 0.4 * c, top + 0.75 * c),
            (x, top + 1.1 * c),
            (x - 0.4 * c, top + 0.75 * c),
            (x - slope * c, top + c),
        ]
        shapes.append(Polygon(tuple(cap), tinted(scene, (246, 250, 255)), on))
    shapes.append(_plain(scene, (122, 116, 108), (150, 142, 128), HORIZON))
    for x, y, depth in _scattered(scene, HORIZON):
        s = 0.5 + y
        stone = ((x - 0.03 * s, y), (x - 0.012 * s, y - 0.024 * s), (x + 0.016 * s, y - 0.02 * s), (x + 0.03 * s, y))
        shapes.append(Polygon(stone, tinted(scene, (94, 90, 90)), surface("ground", depth)))
    return shapes


def _fir(scene: Scene, x: float, base: float, height: float, fill: RGB, on: Surface) -> list[Shape]:
    shapes: list[Shape] = []
    for k in range(3):
        low, top, half = base - height * 0.28 * k, base - height * (0.48 + 0.26 * k), height * (0.34 - 0.07 * k)
        shapes.append(Polygon(((x - half, low), (x, top), (x + half, low)), tinted(scene, fill), on))
    return shapes


def _lake(scene: Scene) -> list[Shape]:
    h = scene.layout.hills
    shapes: list[Shape] = []
    for k in range(8):
        shapes += _fir(
            scene,
            (k + 0.2 + 0.6 * h[k]) / 8,
            HORIZON + 0.01,
            0.10 + 0.06 * h[-1 - k],
            (24, 92, 60),
            surface("plant", 0.95),
        )
    bank = 0.82
    shapes.append(_plain(scene, (60, 140, 214), (24, 92, 180), HORIZON, "water", bank))
    for x, y in scene.layout.ground[:9]:
        wave = HORIZON + 0.03 + 0.25 * y
        ripple = ((x - 0.05, wave), (x - 0.02, wave - 0.008), (x + 0.01, wave), (x + 0.05, wave - 0.006))
        shapes.append(
            Stroke(ripple, 0.010, tinted(scene, (170, 222, 255)), surface("water", ground_depth(scene, wave)))
        )
    shapes.append(_plain(scene, (86, 160, 62), (110, 180, 70), bank))
    for x, y in scene.layout.ground[9:]:
        on = surface("plant", ground_depth(scene, bank))
        shapes.append(
            Stroke(((x, bank + 0.03), (x + 0.01, bank - 0.05 - 0.05 * y)), 0.012, tinted(scene, (60, 120, 40)), on)
        )
    return shapes


def _under_water(scene: Scene) -> list[Shape]:
    shapes: list[Shape] = [_plain(scene, (40, 176, 196), (6, 70, 122), WATER_LINE, "water", 0.86)]
    crest = tuple((t / 16, WATER_LINE + 0.010 * math.sin(1.57 * t + 6.28 * scene.layout.hills[0])) for t in range(17))
    shapes.append(Stroke(crest, 0.022, tinted(scene, (206, 250, 255)), surface("water", FAR)))
    shapes.append(_plain(scene, (196, 180, 128), (224, 206, 150), 0.86))
    for x, y in scene.layout.ground[:5]:
        base, height = 0.88 + 0.06 * y, 0.16 + 0.12 * y
        weed = tuple((x + 0.02 * math.sin(2.0 * k + 6.28 * y), base - height * k / 5) for k in range(6))
        shapes.append(Stroke(weed, 0.024, tinted(scene, (20, 132, 84)), surface("plant", 0.5)))
    for x, y in scene.layout.ground[5:11]:
        r, y = 0.010 + 0.010 * x, 0.38 + 0.44 * y
        on = surface("water", 0.6)
        shapes.append(Ellipse((x - r, y - r, x + r, y + r), tinted(scene, (190, 244, 250)), on))
    return shapes


def _snow(scene: Scene) -> list[Shape]:
    h = scene.layout.hills
    shapes: list[Shape] = [_hill(scene, 0.25 + 0.5 * h[0], 0.6, 0.06, (214, 228, 244), surface("ground", 0.95))]
    for k in range(5):
        x, height = (k + 0.2 + 0.6 * h[k]) / 5, 0.14 + 0.07 * h[7 - k]
        on = surface("plant", 0.92)
        shapes += _fir(scene, x, HORIZON + 0.02, height, (66, 116, 112), on)
        cap = (
            (x - 0.16 * height, HORIZON + 0.02 - 0.72 * height),
            (x, HORIZON + 0.02 - height),
            (x + 0.16 * height, HORIZON + 0.02 - 0.72 * height),
        )
        shapes.append(Polygon(cap, tinted(scene, WHITE), on))
    shapes.append(_plain(scene, (222, 236, 252), (248, 252, 255), HORIZON))
    for x, y, depth in _scattered(scene, HORIZON + 0.03):
        shapes.append(
            Stroke(
                ((x - 0.05, y), (x, y - 0.008), (x + 0.05, y)),
                0.010,
                tinted(scene, (184, 206, 236)),
                surface("ground", depth),
            )
        )
    return shapes


def _beach(scene: Scene) -> list[Shape]:
    shore = 0.68
    phase = scene.layout.hills[0]
    shapes: list[Shape] = [_plain(scene, (20, 130, 200), (60, 206, 214), HORIZON, "water", shore)]
    shapes.append(_plain(scene, (250, 226, 164), (255, 236, 186), shore))
    foam = tuple((t / 12, shore + 0.012 * math.sin(1.4 * t + 6.28 * phase)) for t in range(13))
    shapes.append(Stroke(foam, 0.026, tinted(scene, WHITE), surface("water", ground_depth(scene, shore))))
    x = 0.08 + 0.84 * scene.layout.hills[1]
    boat = surface("building", 0.85)
    shapes.append(
        Polygon(((x, HORIZON - 0.11), (x, HORIZON + 0.01), (x + 0.08, HORIZON + 0.01)), tinted(scene, WHITE), boat)
    )
    shapes.append(
        Polygon(
            (
                (x - 0.05, HORIZON + 0.015),
                (x + 0.09, HORIZON + 0.015),
                (x + 0.06, HORIZON + 0.045),
                (x - 0.02, HORIZON + 0.045),
            ),
            tinted(scene, (200, 60, 40)),
            boat,
        )
    )
    for px, py, depth in _scattered(scene, shore + 0.04):
        shapes.append(
            Ellipse(
                (px - 0.014, py - 0.010, px + 0.014, py + 0.010),
                tinted(scene, (226, 180, 120)),
                surface("ground", depth),
            )
        )
    return shapes


def _city(scene: Scene) -> list[Shape]:
    h = scene.layout.hills
    on = surface("building", 0.95)
    lit: RGB = (255, 232, 130)
    shapes: list[Shape] = []
    for k in range(6):
        x0, height = k / 6, 0.14 + 0.20 * h[k]
        wall = mix((96, 100, 116), (150, 120, 108), h[(k + 3) % 8])
        top = HORIZON - height
        shapes.append(
            Polygon(((x0, HORIZON), (x0, top), (x0 + 0.15, top), (x0 + 0.15, HORIZON)), tinted(scene, wall), on)
        )
        for row in range(int(height / 0.06)):
            for x in (x0 + 0.03, x0 + 0.09):
                y = top + 0.025 + 0.06 * row
                shapes.append(Polygon(((x, y), (x + 0.032, y), (x + 0.032, y + 0.03), (x, y + 0.03)), lit, on))
    shapes.append(_plain(scene, (168, 164, 160), (168, 164, 160), HORIZON, bottom=0.60))
    shapes.append(_plain(scene, (74, 76, 84), (92, 94, 102), 0.60))
    for k in range(5):
        x = (k + h[6]) / 5
        road = surface("ground", ground_depth(scene, 0.78))
        shapes.append(
            Polygon(
                ((x, 0.77), (x + 0.10, 0.77), (x + 0.09, 0.80), (x - 0.01, 0.80)), tinted(scene, (240, 238, 220)), road
            )
        )
    return shapes


_PLACES: dict[str, Callable[[Scene], list[Shape]]] = {
    "desert": _desert,
    "grass": _grass,
    "mountains": _mountains,
    "lake": _lake,
    "under water": _under_water,
    "snow": _snow,
    "beach": _beach,
    "city": _city,
}

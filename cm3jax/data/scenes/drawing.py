"""From a scene to the list of its shapes: the one drawing that picture and truth maps are both painted from."""

import dataclasses

from cm3jax.data.scenes.items import draw_item
from cm3jax.data.scenes.perspective import ground_depth
from cm3jax.data.scenes.places import draw_place
from cm3jax.data.scenes.shapes import Pen, Point, Shape, bounds, surface
from cm3jax.data.scenes.sky import draw_sky
from cm3jax.data.scenes.space import Scene
from cm3jax.data.scenes.subjects import draw_subject

Box = tuple[float, float, float, float]

GROUP_CENTER = {"left": 0.32, "center": 0.5, "right": 0.68}
# Per number of subjects: their least and greatest height, and where each stands: (x from the group's centre, in
# subject heights; y of its feet in the picture). The back row comes first.
_GROUPS: tuple[tuple[float, float, tuple[Point, ...]], ...] = (
    (0.48, 0.54, ((0.0, 0.90),)),
    (0.31, 0.34, ((-0.50, 0.85), (0.50, 0.90))),
    (0.29, 0.315, ((0.0, 0.60), (-0.52, 0.94), (0.52, 0.94))),
    (0.27, 0.295, ((-0.54, 0.60), (0.54, 0.62), (-0.54, 0.94), (0.54, 0.96))),
)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """All shapes, first at the back, and one box (x0, y0, x1, y1) in [0, 1] around each subject without its item."""

    shapes: tuple[Shape, ...]
    boxes: tuple[Box, ...]


def subject_height(scene: Scene) -> float:
    """Height of each subject, in picture heights."""
    least, greatest, _ = _GROUPS[scene.number - 1]
    return least + (greatest - least) * scene.layout.size


def _looks_left(scene: Scene) -> bool:
    """Into the picture, so that no item is cut off at its edge."""
    return scene.position == "right" or (scene.position == "center" and scene.layout.flip < 0.5)


def draw(scene: Scene) -> Drawing:
    """Draws the scene: sky and place, then the subjects with their items from back to front."""
    shapes, boxes = [*draw_sky(scene), *draw_place(scene)], []
    height = subject_height(scene)
    center = GROUP_CENTER[scene.position] + 0.03 * (scene.layout.shift[0] - 0.5)
    looks_left = _looks_left(scene)
    lift = 0.03 * (scene.layout.shift[1] - 0.5)
    for dx, feet in _GROUPS[scene.number - 1][2]:
        y = feet + lift
        depth = max(ground_depth(scene, y), 0.02)
        origin = (center + dx * height, y)
        mirrored = looks_left and scene.subject != "stop sign"  # its year must stay readable
        pen = Pen(origin, height, mirrored, surface("subject", depth))
        anchors = draw_subject(pen, scene.subject, scene.color, scene.year)
        item = Pen(origin, height, looks_left, surface("item", depth))
        draw_item(item, scene.item, anchors)
        boxes.append(bounds(pen.shapes))
        shapes += pen.shapes + item.shapes
    return Drawing(tuple(shapes), tuple(boxes))

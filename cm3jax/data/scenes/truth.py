"""Truth maps of a picture, painted from the very shapes that the picture is painted from."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from cm3jax.data.scenes.drawing import Drawing
from cm3jax.data.scenes.render import Ink, paint, supersampling
from cm3jax.data.scenes.shapes import Gradient, Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """What is known of every pixel of an S x S picture.

    Attributes:
      segmentation: index into `cm3jax.data.scenes.shapes.CLASSES`.
      depth: 0 at the viewer, 255 at the sky, linear in between.
      edges: 255 where a pixel's surface or flat colour differs from its right or lower neighbour's, else 0.
      boxes: (x0, y0, x1, y1) in [0, 1] of each subject, without its item.
    """

    segmentation: UInt8[np.ndarray, "S S"]
    depth: UInt8[np.ndarray, "S S"]
    edges: UInt8[np.ndarray, "S S"]
    boxes: Float[np.ndarray, "N 4"]


def truth(drawing: Drawing, size: int) -> Truth:
    """The truth maps of `render_drawing(drawing, size)`."""
    labels = [(shape.surface.label, shape.surface.label) for shape in drawing.shapes]
    return Truth(
        segmentation=_map(drawing, size, labels).astype(np.uint8),
        depth=_map(drawing, size, [_depths(shape) for shape in drawing.shapes]).astype(np.uint8),
        edges=_edges(_map(drawing, size, _looks(drawing))),
        boxes=np.asarray(drawing.boxes, np.float32),
    )


def _map(drawing: Drawing, size: int, inks: Sequence[tuple[Ink, Ink]]) -> Int[np.ndarray, "S S"]:
    step = supersampling(size)
    return np.asarray(paint(drawing, size, "I", inks))[step // 2 :: step, step // 2 :: step]


def _depths(shape: Shape) -> tuple[int, int]:
    bottom = shape.depth_bottom if isinstance(shape, Gradient) else shape.surface.depth
    return round(255 * shape.surface.depth), round(255 * bottom)


def _looks(drawing: Drawing) -> list[tuple[Ink, Ink]]:
    """One number for all shapes that look the same, so that parts of one body show no seam."""
    numbers: dict[tuple, int] = {}
    looks = [numbers.setdefault((shape.fill, shape.surface), len(numbers)) for shape in drawing.shapes]
    return [(look, look) for look in looks]


def _edges(looks: Int[np.ndarray, "S S"]) -> UInt8[np.ndarray, "S S"]:
    edges = np.zeros(looks.shape, bool)
    edges[:, :-1] |= looks[:, :-1] != looks[:, 1:]
    edges[:-1] |= looks[:-1] != looks[1:]
    return edges.astype(np.uint8) * 255

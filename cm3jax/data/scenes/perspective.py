"""Where sky and ground meet, and how far away the ground is."""

from cm3jax.data.scenes.space import Scene

HORIZON = 0.52
WATER_LINE = 0.30  # under water: the surface, seen from the side, the sky above it
NEAR, FAR = 0.05, 0.9  # depth of the ground at the lower edge and at the horizon


def horizon(scene: Scene) -> float:
    """Height of the line between sky and ground (or water surface), in picture coordinates."""
    return WATER_LINE if scene.place == "under water" else HORIZON


def ground_depth(scene: Scene, y: float) -> float:
    """Distance of the ground seen at height `y`: linear from the horizon to the lower edge, 0 near, 1 the sky."""
    h = horizon(scene)
    return FAR + (NEAR - FAR) * (y - h) / (1 - h)

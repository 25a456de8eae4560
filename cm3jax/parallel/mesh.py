"""The device mesh: axes `replica, data, fsdp, tensor`, in Auto mode.

`jax.make_mesh` defaults to Explicit axis types, which still refuse gathers from sharded tables, cache updates and
accumulation loops; every mesh of the program is therefore made here, with Auto axes said aloud.
"""

import dataclasses
import math

import jax
import numpy as np

AXES = ("replica", "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, "all that are left"."""

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """Mesh of shape [replica, data, fsdp, tensor] over `devices` (default: all of them).

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    free = [i for i, size in enumerate(sizes) if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: at most one axis may be -1 and the others >= 1, found {_named(sizes)}")
    if free:
        known = math.prod(size for size in sizes if size != -1)
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh: {_named(sizes)} does not cover {len(devices)} devices")
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if devices == jax.devices():
        return jax.make_mesh(tuple(sizes), AXES, axis_types=auto)
    return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=auto)


def _named(sizes: list[int]) -> dict[str, int]:
    return dict(zip(AXES, sizes, strict=True))

"""The device mesh: axes `replica, data, fsdp, tensor`, in Auto mode.

`jax.make_mesh` defaults to Explicit axis types, which still refuse gathers from sharded tables, cache updates and
accumulation loops, and it splits no side of a torus; every mesh of the program is therefore made here.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

AXES = ("replica", "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, "all that are left".

    Attributes:
      replica: copies of the whole model that share only gradients; the one axis that may cross slow links, so on
        several TPU slices it is a multiple of their number.
    """

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh of shape [replica, data, fsdp, tensor] over `devices` (default: all of them).

    Raises:
      ValueError: the axes do not multiply to the number of devices, or slices would split another axis than `replica`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(arrange(sizes, devices), AXES, axis_types=auto)


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in an array of shape `sizes`, near ones beside each other; slices are told apart by the first axis alone.

    Raises:
      ValueError: slices would split another axis than the first.
    """
    slices = slice_count(devices)
    # An axis may be a part of a side of a torus, such as 64 of 16 x 16 chips.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(f"mesh: replica is {sizes[0]}, expected a multiple of the {slices} slices of these devices")
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * (len(sizes) - 1))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def axis_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Devices along each axis, with -1 filled in.

    Raises:
      ValueError: the axes do not multiply to `devices`.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    free = [i for i, size in enumerate(sizes) if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: at most one axis may be -1 and the others >= 1, found {_named(sizes)}")
    if free:
        sizes[free[0]] = devices // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != devices:
        raise ValueError(f"mesh: {_named(sizes)} does not cover {devices} devices")
    return tuple(sizes)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """TPU slices, which only a data-centre network joins; 1 for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _named(sizes: list[int]) -> dict[str, int]:
    return dict(zip(AXES, sizes, strict=True))

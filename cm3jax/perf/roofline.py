"""How long an update takes at least on a device, from counts: arithmetic, memory traffic, collectives.

    products = sum over matrix products of max(FLOPs / peak, bytes / memory rate)
    kernels  = max(FLOPs that the program's text does not show / peak, bytes of kernels and copies / memory rate)
    device   = products + kernels + other bytes / memory rate
    links    = sum over collectives of their bytes over the links (or network) that their axes have
    step     = device + links outside of loops + max(0, links inside of loops - device)
    MFU      = model FLOPs / (devices * peak * step)

What overlaps: the traffic of a matrix product (and of what is fused with it) with its arithmetic, and collectives
inside a loop (over layers, or microbatches) with the work of that loop. What does not: other elementwise work, and
collectives outside of loops. The collectives of different axes are added, as if they shared links, and copies between
memories as if nothing ran beside them. FLOPs that the text does not show are those by formula less those of its
products. docs/aot.md says where all this is optimistic.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from cm3jax.perf.collectives import Collective
from cm3jax.perf.hardware import Hardware
from cm3jax.perf.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one update on a device.

    Attributes:
      arithmetic: all executed FLOPs at the peak; a part of what follows.
      products, kernels, others: as in the formula.
      links_in_loops, links_outside: by mesh axes.
      mfu: of `step`.
    """

    arithmetic: float
    products: float
    kernels: float
    others: float
    links_in_loops: dict[str, float]
    links_outside: dict[str, float]
    step: float
    mfu: float


def roofline(
    hardware: Hardware,
    mesh: jax.sharding.Mesh,
    model_flops: float,
    executed_flops: float,
    traffic: Traffic,
    collectives: Sequence[Collective],
) -> Roofline:
    """The formula of this module.

    Args:
      model_flops: of all devices together, as MFU counts them.
      executed_flops: of all devices together, with what is recomputed.
    """
    inside, outside = link_seconds(hardware, mesh, collectives)
    each, memory = executed_flops / mesh.size, hardware.hbm_rate
    products = sum(work.runs * max(work.flops / hardware.flops, work.bytes / memory) for work in traffic.products)
    hidden = max(0.0, each - sum(work.runs * work.flops for work in traffic.products))
    kernels, others = max(hidden / hardware.flops, traffic.kernels / memory), traffic.others / memory
    device = products + kernels + others
    step = device + sum(outside.values()) + max(0.0, sum(inside.values()) - device)
    mfu = model_flops / (hardware.flops * mesh.size * step)
    return Roofline(each / hardware.flops, products, kernels, others, inside, outside, step, mfu)


def link_seconds(
    hardware: Hardware, mesh: jax.sharding.Mesh, collectives: Sequence[Collective]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all collectives by axes ("data+fsdp"): those inside loops, and the others."""
    sums: tuple[dict[str, float], dict[str, float]] = {}, {}
    for one in collectives:
        axes, seconds = "+".join(one.axes), one.runs * collective_seconds(hardware, mesh, one)
        where = sums[0 if one.in_loop else 1]
        where[axes] = where.get(axes, 0.0) + seconds
    return sums


def collective_seconds(hardware: Hardware, mesh: jax.sharding.Mesh, one: Collective) -> float:
    """Seconds of one run: first inside the slices, then, with what is left of each array, between them.

    A ring of n sends (n - 1) / n of the array; an all-reduce does it twice; in an all-to-all over a ring the average
    piece travels a quarter of the way round, and a permutation sends the array once.
    """
    devices = [mesh.devices.flat[position] for position in one.group]
    slices = {getattr(device, "slice_index", 0) for device in devices}
    within = [device for device in devices if getattr(device, "slice_index", 0) == min(slices)]
    total = 0.0
    if len(within) > 1:
        total += _ring_bytes(one.kind, one.bytes, len(within)) / group_rate(hardware, mesh, within)
    if len(slices) > 1:
        total += _ring_bytes(one.kind, one.bytes / len(within), len(slices)) / hardware.network_rate
    return total


def _ring_bytes(kind: str, size: float, devices: int) -> float:
    if kind == "collective-permute":
        return size
    factor = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(kind, 1.0)
    return factor * size * (devices - 1) / devices


def group_rate(hardware: Hardware, mesh: jax.sharding.Mesh, group: Sequence[jax.Device]) -> float:
    """Bytes per second that a device of `group`, devices of one slice, sends to the others of the group.

    On a torus each side along which the group extends gives two links where it closes to a ring, else one; groups that
    stand between each other's devices share them. Other devices have all their links.
    """
    if not hardware.whole_ring:
        return hardware.all_links_rate
    own = min(getattr(device, "slice_index", 0) for device in group)
    slice_ = [device for device in mesh.devices.flat if getattr(device, "slice_index", 0) == own]
    sides = np.asarray([device.coords for device in slice_]).max(0) + 1
    total = 0.0
    for side, along in zip(sides, np.asarray([device.coords for device in group]).T, strict=True):
        places = sorted(set(along.tolist()))
        if len(places) > 1:
            stride = places[1] - places[0]
            ring = side % hardware.whole_ring == 0 and len(places) * stride == side
            total += (2 if ring else 1) * hardware.link_rate / stride
    return total if total else math.inf

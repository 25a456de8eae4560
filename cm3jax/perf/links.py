"""All-reduce over one axis of the mesh: whether its sums are right, and its bandwidth.

Bandwidth is counted as NCCL's tests do ("bus bandwidth"): 2 (n - 1) / n times the bytes of a device, per second. A
device must send at least as much, whatever n is, so it compares with the rate of its links.
"""

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.mesh import AXES
from cm3jax.perf.findings import Finding, everyones, named
from cm3jax.perf.hardware import find_hardware

_BYTES = 64 * 2**20
_CPU_BYTES = 2**20
_RUNS = 5


def check_axis(mesh: jax.sharding.Mesh, axis: str, hosts: list[str], seconds: float, least_share: float) -> Finding:
    """Sums over `axis` in all of its groups at once; all processes must call this together."""
    right, rate = measure(mesh, axis)
    everyone = everyones([right, rate], f"all-reduce over {axis}", seconds)
    name = f"all-reduce {axis}={mesh.shape[axis]}"
    return judge(name, everyone, hosts, *_expected(mesh, axis, hosts), least_share)


def measure(mesh: jax.sharding.Mesh, axis: str) -> tuple[bool, float]:
    """Whether the sums on this process's devices are exact, and the bandwidth in bytes per second that it saw."""
    elements = (_CPU_BYTES if jax.default_backend() == "cpu" else _BYTES) // 4
    pattern = (np.arange(elements) % 7).astype(np.float32)
    rows = NamedSharding(mesh, P(AXES))

    def row(index: Any) -> np.ndarray:
        return pattern[None] + _constant(index[0].start or 0)

    values = jax.make_array_from_callback((mesh.size, elements), rows, row)
    reduce = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    )
    right = _is_right(mesh, axis, reduce(values), pattern)
    start = time.perf_counter()
    for _ in range(_RUNS):
        sums = reduce(values)
        # One at a time: on CPUs, collectives of several calls under way at once may wait for each other for ever.
        sums.block_until_ready()
    each = (time.perf_counter() - start) / _RUNS
    n = mesh.shape[axis]
    return right, 2 * (n - 1) / n * 4 * elements / each


def _constant(row: int) -> float:
    """Differs between devices, and is small enough for exact sums."""
    return float(row % 251 + 1)


def _is_right(mesh: jax.sharding.Mesh, axis: str, sums: jax.Array, pattern: np.ndarray) -> bool:
    ranks = np.arange(mesh.size).reshape(mesh.devices.shape)
    number = AXES.index(axis)
    constants = np.vectorize(_constant)(ranks).sum(axis=number, keepdims=True)
    expected = np.broadcast_to(constants, ranks.shape).reshape(-1)
    return all(
        np.array_equal(np.asarray(shard.data)[0], mesh.shape[axis] * pattern + expected[shard.index[0].start or 0])
        for shard in sums.addressable_shards
    )


def _expected(mesh: jax.sharding.Mesh, axis: str, hosts: list[str]) -> tuple[float | None, str]:
    """The most that the links allow, in bytes per second, and in words what is known of it."""
    device = mesh.devices.flat[0]
    hardware = find_hardware(device.device_kind)
    if device.platform == "cpu":
        return None, "exact sums; CPUs have no links"
    if hardware is None:
        return None, f"exact sums; no link rate known for {device.device_kind!r}"
    groups = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    if device.platform == "tpu":
        joined = all(len({getattr(d, "slice_index", 0) for d in group}) == 1 for group in groups)
    else:
        joined = all(len({hosts[d.process_index] for d in group}) == 1 for group in groups)
    if not joined:
        return None, "exact sums; goes over the network, whose rate is not known"
    most = hardware.all_links_rate
    return most, f"exact sums; all links of a device: {most / 1e9:.0f} GB/s"


def judge(
    name: str, everyone: list[list], hosts: list[str], most: float | None, expected: str, least_share: float
) -> Finding:
    """A wrong sum fails, and so does a rate below `least_share` of the links' where that is known."""
    wrong = {i: "wrong sums" for i, (right, _) in enumerate(everyone) if not right}
    if wrong:
        return Finding(name, False, named(wrong, hosts), expected)
    slow = {i: f"{rate / 1e9:.2f} GB/s" for i, (_, rate) in enumerate(everyone) if most and rate < least_share * most}
    if slow:
        return Finding(name, False, named(slow, hosts), f"{expected}, and at least {least_share:.0%} of it")
    worst = min(rate for _, rate in everyone)
    share = f", {worst / most:.0%} of all links" if most else ""
    return Finding(name, True, f"{worst / 1e9:.2f} GB/s{share}", expected)


def axes_of(mesh: jax.sharding.Mesh) -> list[str]:
    """The axes that join more than one device."""
    return [axis for axis in AXES if mesh.shape[axis] > 1]

"""Matrix products on every device: whether they are exact, and whether one device is slower than the others."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from cm3jax.perf.findings import Finding, everyones, named
from cm3jax.perf.hardware import peak_flops

_SIZE = 8192
_CPU_SIZE = 512
_RUNS = 10
# Entries repeat with this period, so that the exact product is a small table, whatever the size.
_PERIOD = 5


def check_devices(hosts: list[str], seconds: float) -> Finding:
    """Every process has equally many devices of one kind."""
    own = [device.device_kind for device in jax.local_devices()]
    return judge_devices(everyones(own, "devices", seconds), hosts)


def judge_devices(kinds: list[list[str]], hosts: list[str]) -> Finding:
    """What most processes have is taken for right."""
    texts = [" and ".join(f"{own.count(kind)} x {kind}" for kind in sorted(set(own))) for own in kinds]
    common = statistics.mode(texts)
    others = {i: text for i, text in enumerate(texts) if text != common}
    if others:
        return Finding("devices", False, named(others, hosts), f"as the others: {common}")
    one_kind = len(set(kinds[0])) == 1
    return Finding("devices", one_kind, f"{len(texts)} process(es) with {common}", "equally many, of one kind")


def check_matmul(hosts: list[str], seconds: float, slow_share: float) -> Finding:
    """Each device in turn, all processes at once; devices below `slow_share` of the median are named."""
    own = [measure(device) for device in jax.local_devices()]
    everyone = everyones(own, "matrix products", seconds)
    return judge(everyone, hosts, peak(jax.local_devices()[0]), slow_share)


def measure(device: jax.Device) -> dict[str, Any]:
    """Number of the device, FLOP/s of products of two square matrices, and whether every entry was exact."""
    on_cpu = device.platform == "cpu"
    size, dtype = (_CPU_SIZE, jnp.float32) if on_cpu else (_SIZE, jnp.bfloat16)
    here = SingleDeviceSharding(device)
    a, b = jax.jit(lambda: _operands(size, dtype), out_shardings=here)()
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    expected = jax.device_put(jnp.asarray(_product_table(size)), here)
    exact = jax.jit(lambda c, table: jnp.all(c == _tiled(table, size)))(product(a, b), expected)
    right = bool(exact)
    start = time.perf_counter()
    for _ in range(_RUNS):
        last = product(a, b)
    last.block_until_ready()
    rate = 2 * size**3 * _RUNS / (time.perf_counter() - start)
    return {"device": device.id, "rate": rate, "right": right}


def _operands(size: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Small whole numbers, whose products and sums fp32 holds exactly."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return ((i + 2 * j) % _PERIOD - 2).astype(dtype), ((3 * i + j) % _PERIOD - 2).astype(dtype)


def _product_table(size: int) -> np.ndarray:
    """Entry [i, j] of the product, for i and j below the period."""
    k, row = np.arange(size), np.arange(_PERIOD)
    a = (row[:, None] + 2 * k) % _PERIOD - 2
    b = (3 * k[:, None] + row) % _PERIOD - 2
    return (a @ b).astype(np.float32)


def _tiled(table: jax.Array, size: int) -> jax.Array:
    index = jnp.arange(size) % _PERIOD
    return table[index][:, index]


def peak(device: jax.Device) -> float | None:
    """FLOP/s of the data sheet; None for CPUs, which have none, and for devices that the table does not know."""
    if device.platform == "cpu":
        return None
    try:
        return peak_flops(device)
    except ValueError:
        return None


def judge(everyone: list[list[dict[str, Any]]], hosts: list[str], most: float | None, slow_share: float) -> Finding:
    """Wrong products fail, and so does a device that is much slower than the median of all.

    Slowness of CPU devices is not judged: they share cores with each other and with whatever else runs.
    """
    cpu = jax.default_backend() == "cpu"
    median = statistics.median(own["rate"] for devices in everyone for own in devices)
    wrong, slow = {}, {}
    for i, devices in enumerate(everyone):
        if bad := [f"device {own['device']} gives wrong products" for own in devices if not own["right"]]:
            wrong[i] = ", ".join(bad)
        late = [own for own in devices if own["rate"] < slow_share * median]
        if late and not cpu:
            slow[i] = ", ".join(f"device {own['device']} at {own['rate'] / median:.0%} of the median" for own in late)
    expected = f"peak {most / 1e12:.0f} TFLOP/s" if most else "exact products; no peak known"
    if cpu:
        expected = "exact products; CPUs are not judged by speed"
    if wrong or slow:
        return Finding("matrix products", False, named(wrong or slow, hosts), expected)
    worst = min(own["rate"] for devices in everyone for own in devices)
    share = f", {worst / most:.0%} of the peak" if most else ""
    found = f"{worst / 1e12:.3g} to {max(own['rate'] for d in everyone for own in d) / 1e12:.3g} TFLOP/s{share}"
    return Finding("matrix products", True, found, expected)

"""Peak arithmetic rates of devices: the denominator of MFU.

Dense bf16 peaks in FLOP/s per JAX device, from the vendors' data sheets (Google Cloud TPU system architecture pages,
NVIDIA A100, H100 and H200 data sheets, without sparsity). A CPU has no useful data sheet figure: its peak is measured
once per process with a fp32 matrix product.
"""

import functools
import time

import jax
import jax.numpy as jnp

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
_MEASURED_SIZE = 1024
_MEASURED_RUNS = 4


def peak_flops(device: jax.Device) -> float:
    """FLOP/s one device can do at most: the table's entry with the longest matching name, or measured on a CPU.

    Raises:
      ValueError: an accelerator that the table does not know.
    """
    if device.platform == "cpu":
        # Virtual CPU devices share the cores, so each has its share of the measured rate.
        return _measured_cpu_flops() / jax.local_device_count()
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    if not names:
        raise ValueError(f"no peak rate known for {device.device_kind!r}; known: {', '.join(PEAK_FLOPS)}")
    return PEAK_FLOPS[max(names, key=len)]


@functools.cache
def _measured_cpu_flops() -> float:
    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((_MEASURED_SIZE, _MEASURED_SIZE), jnp.float32)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(_MEASURED_RUNS):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * _MEASURED_SIZE**3 / best

"""What devices can do, from their data sheets: the one table behind MFU, link checks and predictions.

Sources: Google Cloud's pages on TPU v4, v5e, v5p and v6e (system architecture) and NVIDIA's data sheets of A100
(80 GB), H100 (SXM) and H200. Arithmetic is dense bf16 without sparsity. Links and network count one direction; where a
page gives both directions together ("bidirectional"), the figure here is half of it. The network is a chip's share of
the network cards of its host: of two times 100 Gbit/s for the eight chips of v5e, four times 200 for those of v6e; for
v5p and v4 the pages give none, and 200 and 100 Gbit/s for a host of four are assumed. A CPU has no useful figure: its
arithmetic is measured once per process with a fp32 matrix product.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
      name: as in topologies and the flag files of launch/.
      kinds: beginnings of JAX's `device_kind`.
      flops: dense bf16 FLOP/s.
      hbm_bytes, hbm_rate: memory, and its bytes per second.
      links, link_rate: links of a device, and bytes per second that one of them sends.
      whole_ring: the length from which, and in whose multiples, a side of a TPU's torus closes to a ring; 0 for devices
        that a switch joins.
      network_rate: bytes per second that a device's share of its host's network cards sends.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm_bytes: float
    hbm_rate: float
    links: int
    link_rate: float
    whole_ring: int
    network_rate: float

    @property
    def all_links_rate(self) -> float:
        """Bytes per second that a device sends over all its links; a mesh axis may have fewer of them."""
        return self.links * self.link_rate


_GIB = 2**30

HARDWARE = (
    Hardware("v4", ("TPU v4",), 275e12, 32 * _GIB, 1228e9, 6, 50e9, 4, 3.125e9),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 4, 50e9, 16, 3.125e9),
    Hardware("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 6, 100e9, 4, 6.25e9),
    Hardware("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 4, 100e9, 16, 12.5e9),
    Hardware("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 12, 25e9, 0, 25e9),
    Hardware("h100", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 18, 25e9, 0, 50e9),
    Hardware("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 18, 25e9, 0, 50e9),
)
_MEASURED_SIZE = 1024
_MEASURED_RUNS = 4


def find_hardware(kind: str) -> Hardware | None:
    """The entry with the longest beginning of `kind`; None for a device that the table does not know."""
    matches = [(len(start), hardware) for hardware in HARDWARE for start in hardware.kinds if kind.startswith(start)]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def device_name(kind: str) -> str:
    """The short name of a device kind ("v5e" of "TPU v5 lite"); of an unknown kind, the kind itself."""
    hardware = find_hardware(kind)
    return hardware.name if hardware else kind


def peak_flops(device: jax.Device) -> float:
    """FLOP/s one device can do at most, or what was measured on a CPU.

    Raises:
      ValueError: an accelerator that the table does not know.
    """
    if device.platform == "cpu":
        # Virtual CPU devices share the cores, so each has its share of the measured rate.
        return _measured_cpu_flops() / jax.local_device_count()
    hardware = find_hardware(device.device_kind)
    if hardware is None:
        known = ", ".join(start for row in HARDWARE for start in row.kinds)
        raise ValueError(f"no peak rate known for {device.device_kind!r}; known: {known}")
    return hardware.flops


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

"""TPU topologies that this machine does not have, as devices to compile for; needs libtpu, and no TPU."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from cm3jax.config import ConfigError
from cm3jax.perf.hardware import HARDWARE

_TEXT = re.compile(r"(?:(\d+)\*)?([a-z]+\d+[a-z]*):(\d+(?:x\d+)*)")
# libtpu asks the cloud's metadata server for the first four, and waits for an answer, unless they are there.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    # Two processes that only compile do not get into each other's way.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The compiler joins the two cores of a chip only where told; see launch/flags/v4.sh.
_CHIP_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices, each with `shape` chips."""

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.chip}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str, slices: int | None = None) -> Topology:
    """Reads "v5p:8x8x8", or "2*v5p:8x8x8" for two slices.

    Args:
      slices: their number, where `text` does not say it.

    Raises:
      ConfigError: another form, a chip that the table does not know, or sides that it cannot have.
    """
    match = _TEXT.fullmatch(text)
    rings = {hardware.name: hardware.whole_ring for hardware in HARDWARE if hardware.whole_ring}
    if match is None or match.group(2) not in rings:
        raise ConfigError(
            f"topology {text!r}: expected CHIP:SIDESxSIDES, like v5p:8x8x8, with a CHIP of {', '.join(rings)}"
        )
    number, chip, sides = match.groups()
    if number and slices:
        raise ConfigError(f"topology {text!r} says its slices, and --slices says {slices}")
    shape, expected = tuple(map(int, sides.split("x"))), 2 if rings[chip] == 16 else 3
    if len(shape) != expected or min(shape) < 1:
        raise ConfigError(f"topology {text!r}: {chip} has {expected} sides of at least 1 chip, found {len(shape)}")
    count = int(number or slices or 1)
    if count < 1:
        raise ConfigError(f"topology {text!r}: expected at least 1 slice, found {count}")
    return Topology(chip, shape, count)


def described_devices(topology: Topology) -> list[jax.Device]:
    """Devices that programs can be compiled for, but not run on.

    Raises:
      ConfigError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs libtpu, which is not installed: pip install -e '.[aot]'")
    from jax.experimental import topologies

    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = dict(_CHIP_OPTIONS.get(topology.chip, {}))
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip}:{'x'.join(map(str, topology.shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(f"topology {topology}: {error}") from error
    return list(described.devices)

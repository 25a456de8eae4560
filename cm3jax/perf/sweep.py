"""Layouts of a run on one topology: what to try, in an order in which failures and successes spare compilations."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cm3jax.config import ConfigError
from cm3jax.machines import MachineRule
from cm3jax.parallel.layout import LayoutError
from cm3jax.parallel.mesh import AXES, MeshConfig
from cm3jax.perf.aot import Prediction

# From the least recomputation to the most.
REMATS = ("none", "dots", "offload", "full")
MICROBATCHES = (1, 2, 4, 8)
# Weights gathered from so many devices at once still come in pieces that fill the links.
NEAR = 64


def likely_meshes(devices: int, slices: int) -> list[MeshConfig]:
    """Everything over `fsdp`; copies of groups of 64; and tensors over two or four devices."""
    found = [MeshConfig(replica=slices, data=1, fsdp=-1)]
    each = devices // slices
    if each > NEAR and each % NEAR == 0:
        found.append(MeshConfig(replica=slices, data=-1, fsdp=NEAR))
    return found + [MeshConfig(replica=slices, data=1, fsdp=-1, tensor=t) for t in (2, 4) if each % t == 0 and each > t]


def parse_meshes(text: str) -> list[MeshConfig]:
    """Reads "data=8,fsdp=-1;fsdp=-1,tensor=2"; an axis that is not named is 1.

    Raises:
      ConfigError: another form, or an axis that meshes do not have.
    """
    found = []
    for part in text.split(";"):
        sizes = dict.fromkeys(AXES, 1)
        for word in part.split(","):
            axis, _, size = word.strip().partition("=")
            if axis not in AXES or not size.lstrip("-").isdecimal():
                raise ConfigError(
                    f"mesh {part!r}: expected AXIS=SIZE,... with the axes {', '.join(AXES)}, found {word!r}"
                )
            sizes[axis] = int(size)
        found.append(MeshConfig(**sizes))
    return found


def sweep(
    chip: str,
    meshes: Sequence[MeshConfig],
    microbatches: Sequence[int],
    remats: Sequence[str],
    predict_rule: Callable[[MachineRule], Prediction],
) -> Iterator[tuple[str, Prediction | str]]:
    """Predictions of layouts, or why a layout cannot be.

    For a mesh and microbatch, what recomputes more is left out once something fits; larger microbatches are left out
    once one does not fit with all recomputed.
    """
    for mesh in meshes:
        for microbatch in sorted(microbatches):
            fits = False
            for remat in sorted(remats, key=REMATS.index):
                values: dict[str, Any] = {"chip": chip, "mesh": mesh, "microbatch": microbatch, "remat": remat}
                name = f"{mesh_name(mesh)} microbatch={microbatch} remat={remat}"
                try:
                    found = predict_rule(MachineRule(**values))
                except (ConfigError, LayoutError) as error:
                    yield name, str(error)
                    break
                yield name, found
                fits = found.fits
                if fits:
                    break
            if not fits:
                break


def mesh_name(mesh: MeshConfig) -> str:
    """The axes that are not 1."""
    return ",".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) != 1) or "one device"

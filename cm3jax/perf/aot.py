"""The update of a task, compiled ahead of time for devices that need not be there, and what that says of it."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from cm3jax.perf.collectives import find_collectives, total_bytes
from cm3jax.perf.hardware import find_hardware
from cm3jax.perf.hlo import parse
from cm3jax.perf.roofline import Roofline, roofline
from cm3jax.perf.traced import forward_flops
from cm3jax.perf.traffic import memory_traffic
from cm3jax.tasks.task import Task
from cm3jax.tasks.update import abstract_state, lower_update

_USED = re.compile(r"Used ([\d.]+)([KMG]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      params, optimizer: of the state, by its shardings.
      activations: temporaries of the update, and its program.
      total: all that must fit at once; the state is donated, so it counts once.
    """

    params: int
    optimizer: int
    activations: int
    total: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is known of an update on a mesh before it runs.

    Attributes:
      params: weights of the model.
      memory: None where the compiler refused because it does not fit.
      needed_bytes: of a device's memory.
      model_flops, executed_flops: of all devices in one update, by formula; the second with what is recomputed.
      collectives: kind, axes, times an update, bytes an update on a device.
      memory_traffic: bytes an update on a device.
      seconds, cpu_seconds: of compiling.
    """

    device_kind: str
    devices: int
    mesh: dict[str, int]
    params: int
    hbm_bytes: float
    needed_bytes: float
    memory: Memory | None
    model_flops: float
    executed_flops: float
    collectives: list[tuple[str, str, int, int]]
    memory_traffic: float
    roofline: Roofline | None
    seconds: float
    cpu_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the update fits in the memory of a device."""
        return self.memory is not None and self.needed_bytes <= self.hbm_bytes


def predict(task: Task, mesh: jax.sharding.Mesh) -> Prediction:
    """Compiles the update of `task` for `mesh` as training does, and reads the result.

    Raises:
      LayoutError: the mesh cannot hold the state.
      ValueError: devices that the table does not know, or a program that cannot be read.
    """
    kind = mesh.devices.flat[0].device_kind
    hardware = find_hardware(kind)
    if hardware is None:
        raise ValueError(f"no data sheet figures for {kind!r} in perf/hardware.py")
    state = abstract_state(task, mesh)
    with jax.set_mesh(mesh):
        executed = forward_flops(task.step, _plain(state), task.batch_shapes())
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    common: dict[str, Any] = {
        "device_kind": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "params": params,
        "hbm_bytes": hardware.hbm_bytes,
        "model_flops": task.flops_per_batch,
        "executed_flops": executed,
    }
    started, cpu = time.perf_counter(), time.process_time()
    try:
        compiled = compile_update(task, mesh, state)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Prediction(
            **common, needed_bytes=_needed(str(error)), memory=None, collectives=[], memory_traffic=0.0, roofline=None,
            seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu,
        )  # fmt: skip
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    memory, module = _memory(compiled, state), parse(_text(compiled))
    found, traffic = find_collectives(module, mesh), memory_traffic(module)
    rows = [(kind, "+".join(axes), times, size) for (kind, axes), (times, size) in total_bytes(found).items()]
    return Prediction(
        **common,
        needed_bytes=memory.total,
        memory=memory,
        collectives=rows,
        memory_traffic=traffic.bytes,
        roofline=roofline(hardware, mesh, task.flops_per_batch, executed, traffic, found),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def compile_update(task: Task, mesh: jax.sharding.Mesh, state: Any) -> jax.stages.Compiled:
    """What training compiles, for the same mesh; `state` is its abstract state."""
    with jax.set_mesh(mesh):
        return lower_update(task, mesh, state).compile()


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded (abstract) arrays on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _memory(compiled: jax.stages.Compiled, state: Any) -> Memory:
    found: Any = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    activations = found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return Memory(device_bytes(state.params), device_bytes(state.opt_state), activations, held + activations)


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"jax {jax.__version__} cannot read what this libtpu compiled; the constraints files name the libtpu of "
            f"each jax ({str(error)[:200]})"
        ) from error


def _needed(message: str) -> float:
    """Bytes that the compiler says a program needs, when it refuses it; infinity where it does not say."""
    found = _USED.search(message)
    return float(found.group(1)) * _UNITS[found.group(2)] if found else math.inf


def _plain(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

"""What a compiled program sends between devices: every collective, its mesh axes, its bytes, and how often it runs."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from cm3jax.parallel.mesh import slice_count
from cm3jax.perf.hlo import Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_LISTS = re.compile(r"(replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((\[[\d,]+\]T\([\d,]+\))\))? ?\{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
# Between slices: the data a device hands to its host, for what the runtime does with it.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_AXIS_USE = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      axes: of the mesh, those along which the devices of a group differ.
      group: devices of one group, as positions in the flattened mesh.
      bytes: of the whole array on a device: what an all-gather gives, what the others take.
      runs: in one run of the program.
      in_loop: it stands in a loop of more than one round.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    bytes: int
    runs: int
    in_loop: bool = False


def find_collectives(module: Module, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives of a program that was compiled for `mesh`; those inside one device alone are left out.

    Raises:
      ValueError: groups written in a way that is not known, or a loop without a known number of rounds.
    """
    found = []
    for name, instructions in module.computations.items():
        for instruction in instructions.values():
            kind, runs = _kind(instruction), module.runs[name]
            if kind is None or not runs:
                continue
            group = _across_slices(mesh) if instruction.opcode == "send" else _group(instruction, mesh.size)
            if len(group) > 1:
                size = _bytes(instruction, kind, len(group))
                found.append(Collective(kind, axes_of_group(mesh, group), group, size, runs, runs > 1))
    return found


def _kind(instruction: Instruction) -> str | None:
    if instruction.opcode == "send" and (between := _MEGASCALE.search(instruction.text)):
        kind = between.group(1).lower().replace("_", "-")
        return "collective-permute" if kind == "one-to-one" else kind
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _across_slices(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """The first device of every slice; a program of several slices numbers the devices of each by itself."""
    return tuple(range(0, mesh.size, mesh.size // slice_count(list(mesh.devices.flat))))


def axes_of_group(mesh: jax.sharding.Mesh, group: Sequence[int]) -> tuple[str, ...]:
    """The axes of `mesh` along which the devices at these positions differ."""
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    return tuple(axis for axis, along in zip(mesh.axis_names, places, strict=True) if len(set(along.tolist())) > 1)


def total_bytes(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """(times, bytes) of one run of the program by kind and axes."""
    sums: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for one in found:
        times, size = sums[one.kind, one.axes]
        sums[one.kind, one.axes] = (times + one.runs, size + one.runs * one.bytes)
    return dict(sorted(sums.items()))


def collectives_text(found: Sequence[Collective]) -> str:
    """One line for each kind, axes and size: times a run of the program, bytes each time."""
    sums: collections.Counter[tuple[str, tuple[str, ...], int]] = collections.Counter()
    for one in found:
        sums[one.kind, one.axes, one.bytes] += one.runs
    rows = [(kind, "+".join(axes), str(times), str(size)) for (kind, axes, size), times in sorted(sums.items())]
    return "".join(f"{kind:<20}{axes:<24}{times:>6} x {size:>12} B\n" for kind, axes, times, size in rows)


def _bytes(instruction: Instruction, kind: str, group: int) -> int:
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # (operands, results, contexts): the results are as many as the operands, and follow them.
        count = len(instruction.operands)
        shapes = shapes[count : 2 * count]
    if instruction.opcode == "send":
        # (data, context, token): what goes in.
        return shapes[0].bytes * (group if kind == "all-gather" else 1)
    size = sum(shape.bytes for shape in shapes)
    return size * group if kind == "reduce-scatter" else size


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of more than one device, or of a permutation all devices that its first chain of pairs joins."""
    text = instruction.text
    if found := _IOTA.search(text):
        sizes, dims, order = (tuple(map(int, part.split(","))) if part else () for part in found.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return tuple(ids.transpose(order or None).reshape(sizes)[0].tolist())
    if found := _MESH.search(text):
        return _mesh_group(*found.groups())
    if found := _LISTS.search(text):
        groups = [tuple(map(int, part.split(","))) for part in re.findall(r"\{([\d, ]+)\}", found.group(0))]
        if not groups:
            return tuple(range(devices))
        return _chain(groups) if found.group(1) == "source_target_pairs" else groups[0]
    raise ValueError(f"{instruction.name}: no replica groups in {text[:120]!r}")


def _mesh_group(axes: str, order: str | None, used: str) -> tuple[int, ...]:
    sizes = {axis: int(size) for axis, size in _AXIS.findall(axes)}
    ids: np.ndarray = np.arange(math.prod(sizes.values()))
    if order is not None:
        dims, turned = (tuple(map(int, part.split(","))) for part in _ORDER.findall(order)[0])
        ids = ids.reshape(dims).transpose(turned)
    ids = ids.reshape(tuple(sizes.values()))
    index: list[np.ndarray] = [np.zeros(1, int)] * len(sizes)
    for axis, before, part in _AXIS_USE.findall(used):
        place, size = list(sizes).index(axis), sizes[axis]
        # A part of an axis, as if it were reshaped to (before, part, the rest): every (the rest)th device.
        count, step = (int(part), size // (int(before) * int(part))) if part else (size, 1)
        index[place] = np.arange(count) * step
    return tuple(ids[np.ix_(*index)].reshape(-1).tolist())


def _chain(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    follows = {pair[0]: pair[1] for pair in pairs if pair[0] != pair[1]}
    if not follows:
        return ()
    group = [next(iter(follows))]
    while group[-1] in follows and follows[group[-1]] not in group:
        group.append(follows[group[-1]])
    return tuple(group)

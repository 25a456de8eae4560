"""Checks of a layout before anything is computed, and the layout as text.

A wrong spec is found here by name, at start, and not as an error from inside the compiler or as a lack of memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

# With fully sharded weights, at most this share of their bytes may be whole on every device.
LEAST_SHARDED = 0.98


class LayoutError(ValueError):
    """A layout that the mesh cannot have; the message names the arrays."""


def check_layout(mesh: jax.sharding.Mesh, abstract: Any, specs: Any) -> None:
    """Checks the whole training state: no axis twice, dimensions divisible, weights sharded where `fsdp` > 1.

    Args:
      abstract: a `TrainState` of shapes.
      specs: the same tree of partition specs.

    Raises:
      LayoutError: all problems in one message.
    """
    problems = [problem for row in _rows(abstract, specs) for problem in _problems(mesh, *row)]
    if not problems and mesh.shape["fsdp"] > 1:
        share, whole = sharded_share(abstract.params, specs.params)
        if share < LEAST_SHARDED:
            problems.append(
                f"only {share:.1%} of the weights' bytes are sharded, expected {LEAST_SHARDED:.0%}; whole on every "
                f"device: {', '.join(whole[:5])}"
            )
    if problems:
        raise LayoutError(f"mesh {dict(mesh.shape)}: {'; '.join(problems)}")


def sharded_share(abstract: Any, specs: Any) -> tuple[float, list[str]]:
    """Share of the bytes that are split over `fsdp` or `tensor`, and the names of the other arrays, largest first."""
    total, whole = 0, []
    for name, array, spec in _rows(abstract, specs):
        size = array.size * array.dtype.itemsize
        total += size
        if not {"fsdp", "tensor"} & set(_axes(spec)):
            whole.append((size, name))
    whole.sort(key=lambda row: (-row[0], row[1]))
    return 1 - sum(size for size, _ in whole) / max(total, 1), [name for _, name in whole]


def layout_text(mesh: jax.sharding.Mesh, abstract: Any, specs: Any) -> str:
    """One line an array: name, type and shape, spec, bytes on each device."""
    rows = []
    for name, array, spec in _rows(abstract, specs):
        shape = f"{array.dtype}[{','.join(map(str, array.shape))}]"
        parts = math.prod(mesh.shape[axis] for axis in _axes(spec))
        rows.append((name, shape, str(tuple(spec)), f"{array.size * array.dtype.itemsize // parts}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"mesh {dict(mesh.shape)}",
        *("  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in rows),
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _problems(mesh: jax.sharding.Mesh, name: str, array: jax.ShapeDtypeStruct, spec: P) -> Iterator[str]:
    used = list(_axes(spec))
    for axis in sorted({axis for axis in used if used.count(axis) > 1}):
        yield f"{name}: axis {axis} twice in {spec}"
    if len(spec) > len(array.shape):
        yield f"{name}: {spec} for shape {array.shape}"
        return
    for dimension, entry in enumerate(spec):
        axes = _entry_axes(entry)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if array.shape[dimension] % parts:
            yield (f"{name}: dimension {dimension} of {array.shape} is not divisible by {parts} ({', '.join(axes)})")


def _rows(abstract: Any, specs: Any) -> Iterator[tuple[str, jax.ShapeDtypeStruct, P]]:
    flat = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))
    for (path, array), spec in zip(jax.tree.leaves_with_path(abstract), flat, strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), array, spec


def _axes(spec: P) -> Iterator[str]:
    for entry in spec:
        yield from _entry_axes(entry)


def _entry_axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)

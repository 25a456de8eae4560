"""Predictions for people and for programs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from cm3jax.perf.aot import Prediction

_GIB = 2**30


def prediction_text(found: Prediction) -> str:
    """All that is known of an update, several lines."""
    lines = [
        f"devices           {found.devices} x {found.device_kind}, mesh {_mesh(found.mesh)}",
        f"parameters        {found.params / 1e6:,.0f} M",
        f"FLOPs of an update  model {found.model_flops:.3e}, with what is recomputed {found.executed_flops:.3e}",
        f"compiled in       {found.seconds:.0f} s ({found.cpu_seconds:.0f} s of processor time)",
        *_memory_lines(found),
    ]
    if found.roofline is not None:
        line = found.roofline
        lines += [
            "collectives of an update, on each device",
            *(
                f"  {kind:<20}{axes:<18}{times:>7} x  {size / _GIB:>9.3f} GiB"
                for kind, axes, times, size in found.collectives
            ),
            "seconds of an update",
            f"  products           {line.products:.4f} (all arithmetic at the peak: {line.arithmetic:.4f})",
            f"  kernels, copies    {line.kernels:.4f}",
            f"  other memory work  {line.others:.4f} (all memory traffic: {found.memory_traffic / 1e9:,.0f} GB)",
            *(f"  links {axes:<12} {seconds:.4f} in loops" for axes, seconds in line.links_in_loops.items()),
            *(f"  links {axes:<12} {seconds:.4f} outside of loops" for axes, seconds in line.links_outside.items()),
            f"  step               {line.step:.4f}",
            f"predicted MFU     {line.mfu:.1%}",
        ]
    return "\n".join(lines)


def _memory_lines(found: Prediction) -> list[str]:
    verdict = "fits" if found.fits else "DOES NOT FIT"
    needed = f"{found.needed_bytes / _GIB:.2f} GiB" if math.isfinite(found.needed_bytes) else "more than there is"
    head = f"memory            {needed} of {found.hbm_bytes / _GIB:.2f} GiB: {verdict}"
    if found.memory is None:
        return [head]
    parts = (("parameters", "params"), ("optimizer", "optimizer"), ("activations", "activations"))
    return [head, *(f"  {word:<16}{getattr(found.memory, name) / _GIB:>8.3f} GiB" for word, name in parts)]


def prediction_values(found: Prediction) -> dict[str, Any]:
    """The same as JSON values; what is infinite or unknown is null."""
    values = dataclasses.asdict(found) | {"fits": found.fits}
    if not math.isfinite(found.needed_bytes):
        values["needed_bytes"] = None
    return values


def sweep_table(rows: Sequence[tuple[str, Prediction | str]]) -> str:
    """A line for each layout that was tried: its name, and the prediction or why there is none."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {found if isinstance(found, str) else summary(found)}" for name, found in rows)


def summary(found: Prediction) -> str:
    """Memory, time and MFU in one line."""
    needed = f"{found.needed_bytes / _GIB:6.2f} of {found.hbm_bytes / _GIB:.0f} GiB"
    if not found.fits or found.roofline is None:
        return f"{needed}  does not fit"
    return f"{needed}  {found.roofline.step:7.3f} s  MFU {found.roofline.mfu:.1%}"


def best(rows: Sequence[tuple[str, Prediction | str]]) -> tuple[str, Prediction] | None:
    """Of what fits, the layout with the highest predicted MFU."""
    fitting = [(name, found) for name, found in rows if not isinstance(found, str) and found.fits and found.roofline]
    return max(fitting, key=lambda row: row[1].roofline.mfu if row[1].roofline else 0.0, default=None)


def _mesh(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "of one device"

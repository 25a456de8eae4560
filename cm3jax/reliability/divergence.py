"""Do replicas still agree? Devices that should hold the same numbers are compared, bit for bit.

A chip that computes wrongly now and then, without any error (Llama 3 met six such in 54 days, arXiv 2407.21783, section
3.3.4), makes its replica drift from the others; the training loss shows it late or never.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from cm3jax.parallel.mesh import AXES
from cm3jax.reliability.checksum import checksum


class DivergenceError(RuntimeError):
    """Replicas that differ; the message names array, shard and device."""


class DivergenceCheck:
    """Compares the copies of every shard of a state; compiled once for states of one layout."""

    def __init__(self, mesh: jax.sharding.Mesh, state: Any):
        """A check for states like `state`, of which only shapes and shardings are used."""
        self._devices = list(mesh.devices.flat)
        self._names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in _leaves(state)]
        leaves: list[Any] = [leaf for _, leaf in _leaves(state)]
        self._copies = [_copies(leaf, self._devices) for leaf in leaves]

        def on_device(*parts: Array) -> UInt32[Array, "1 leaves"]:
            return jnp.stack([checksum(part) for part in parts])[None]

        # Nothing is assumed of replicas (`check_vma`): whether they agree is the question.
        specs = tuple(leaf.sharding.spec for leaf in leaves)
        each = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(AXES), check_vma=False)
        self._checksums = jax.jit(each, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, state: Any) -> None:
        """Returns when all copies agree.

        Raises:
          DivergenceError: they do not. Where more than two copies exist the odd ones out are named.
        """
        sums = np.asarray(self._checksums(*jax.tree.leaves(state)))
        found = []
        for leaf, (name, copies) in enumerate(zip(self._names, self._copies, strict=True)):
            for shard, holders in copies.items():
                values = sums[holders, leaf]
                common, votes = collections.Counter(values.tolist()).most_common(1)[0]
                odd = holders if votes * 2 <= len(holders) else [d for d in holders if sums[d, leaf] != common]
                if votes < len(holders):
                    found.append(f"{name}{shard} on {', '.join(self._describe(d) for d in odd)}")
        if found:
            raise DivergenceError(f"replicas differ: {'; '.join(found)}")

    def _describe(self, index: int) -> str:
        device = self._devices[index]
        return f"device {device.id} (process {device.process_index})"


def _leaves(state: Any) -> list[tuple[Any, jax.Array]]:
    return jax.tree.leaves_with_path(state)


def _copies(leaf: jax.Array, devices: list[jax.Device]) -> dict[str, list[int]]:
    """Parts of `leaf` that several devices hold: "[0:4, :]" -> places of those devices in `devices`."""
    held = leaf.sharding.devices_indices_map(leaf.shape)
    parts: dict[str, list[int]] = {}
    for place, device in enumerate(devices):
        index = held[device]
        shard = ", ".join("" if s == slice(None) else f"{s.start or 0}:{s.stop or ''}" for s in index)
        parts.setdefault(f"[{shard}]", []).append(place)
    return {shard: holders for shard, holders in parts.items() if len(holders) > 1}

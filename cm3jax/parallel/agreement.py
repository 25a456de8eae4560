"""Decisions that all processes must take at the same update: stop, save now.

Each process may raise a flag at any time (a signal came, the clock says so). Flags go into every update and come out
of it reduced over the mesh; they are read one update late, with its metrics. Every process then sees the same flags at
the same update, and none waits for another that it would not have waited for anyway.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from cm3jax.parallel.mesh import AXES
from cm3jax.parallel.specs import replicated


class Flags:
    """Arrays with a row of flags for every device; a process fills the rows of its own devices."""

    def __init__(self, mesh: jax.sharding.Mesh, count: int):
        self.shape = jax.ShapeDtypeStruct((mesh.size, count), jnp.bool_, sharding=NamedSharding(mesh, P(AXES)))

    def raised(self, flags: Sequence[bool]) -> Bool[Array, "devices flags"]:
        """The array of this moment; every process must call this equally often."""
        row = np.asarray(flags, bool)[None]
        return jax.make_array_from_callback(self.shape.shape, self.shape.sharding, lambda _: row)


def agreed(flags: Bool[Array, "devices flags"]) -> Bool[Array, " flags"]:
    """True where any process says so."""
    return replicated(jnp.any(flags, axis=0))

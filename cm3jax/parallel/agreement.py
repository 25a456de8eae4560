"""Decisions that all processes must take at the same update: stop, save now.

Each process may raise a flag at any time (a signal came, the clock says so). Flags are reduced over the mesh beside
every update and read one update late, with its metrics: every process then sees the same flags at the same update, and
none waits for another that it would not have waited for anyway.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from cm3jax.parallel.mesh import AXES


class Agreement:
    """The logical or of what the processes say."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._devices = mesh.size
        self._rows = NamedSharding(mesh, P(AXES))
        self._any = jax.jit(lambda rows: jnp.any(rows, axis=0), out_shardings=NamedSharding(mesh, P()))

    def any(self, flags: Sequence[bool]) -> Bool[Array, " flags"]:
        """True where any process says so; every process must call this equally often."""
        row = np.asarray(flags, bool)[None]
        shape = (self._devices, len(flags))
        return self._any(jax.make_array_from_callback(shape, self._rows, lambda _: row))

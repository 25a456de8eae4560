"""Which keys a query sees, as a description that each kernel builds its own form of."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query at position p sees the keys in slots 0 .. p, narrowed by segments and by a window.

    Attributes:
      positions: [b, T] of the queries, one row for all of the batch (b = 1) or one each. None when queries and keys are
        the same whole sequence: query t is at position t.
      segments: [B, T] of a whole sequence; a query sees only keys with its own number.
      window: at most so many keys are seen, the last of them the query's own.

    Raises:
      ValueError: segments for queries with positions of their own, or a window that is not positive.
    """

    positions: Int[Array, "b T"] | None = None
    segments: Int[Array, "B T"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        if self.positions is not None and self.segments is not None:
            raise ValueError(
                "attention: segments are of a whole sequence, whose queries have no positions of their own"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention: window {self.window}, expected at least 1")

    def dense(self, queries: int, keys: int) -> Bool[Array, "b T S"]:
        """True where query t sees key s; b is 1 when that is the same for all rows."""
        if self.positions is not None:
            return _near(self.positions[:, :, None], jnp.arange(keys), self.window)
        found = self.block(slice(0, queries), slice(0, keys))
        return jnp.ones((1, queries, keys), bool) if found is None else found

    def keys_of(self, start: int, end: int) -> tuple[int, int]:
        """The range of keys outside of which no query of start .. end - 1 of a whole sequence sees any."""
        return 0 if self.window is None else max(0, start + 1 - self.window), end

    def block(self, queries: slice, keys: slice) -> Bool[Array, "b t s"] | None:
        """The dense mask of a rectangle of a whole sequence; None where every query sees every key."""
        found = None
        crosses_diagonal = keys.stop - 1 > queries.start
        crosses_window = self.window is not None and queries.stop - 1 - keys.start >= self.window
        if crosses_diagonal or crosses_window:
            at = jnp.arange(queries.start, queries.stop)[None, :, None]
            found = _near(at, jnp.arange(keys.start, keys.stop), self.window)
        if self.segments is not None:
            same = self.segments[:, queries, None] == self.segments[:, None, keys]
            found = same if found is None else found & same
        return found


def _near(queries: Int[Array, "b T 1"], keys: Int[Array, " S"], window: int | None) -> Bool[Array, "b T S"]:
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)

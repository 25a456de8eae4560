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
        at = jnp.arange(queries)[None] if self.positions is None else self.positions
        seen = visible(at[:, :, None], jnp.arange(keys), self.window)
        if self.segments is None:
            return seen
        return seen & (self.segments[:, :, None] == self.segments[:, None])


def visible(queries: Int[Array, "... T 1"], keys: Int[Array, " S"], window: int | None) -> Bool[Array, "... T S"]:
    """Whether queries at these positions see the keys in these slots, whatever the segments."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)

"""Drawing the next token: temperature, top-k, top-p, greedy.

The draw of a row depends on its logits, its request's seed and the number of the token alone, never on which other
requests share the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 for all.
      top_p: only the most likely tokens that together hold this share of the probability (arXiv 1904.09751).

    Raises:
      ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling: temperature must be >= 0 and finite, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"sampling: top_k must be >= 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must be in (0, 1], found {self.top_p}")

    @property
    def truncates(self) -> bool:
        """Whether any token is cut off, which costs a sort of the logits."""
        return self.top_k > 0 or self.top_p < 1

    def arrays(self) -> "Sampling":
        return Sampling(jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """`SamplingConfig` as arrays, so that other values need no new compilation."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def row_keys(seeds: UInt32[Array, " B"], number: Int[Array, ""]) -> jax.Array:
    """One key [B] for each request's token `number` (0 is the first one drawn)."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), number))(seeds)


def sample(keys: jax.Array, logits: Float[Array, "B V"], sampling: Sampling, truncate: bool) -> Int[Array, " B"]:
    """Draws one token a row; of tokens with logit -inf none is ever drawn.

    Args:
      truncate: `SamplingConfig.truncates`; static, since it decides whether the logits are sorted.
    """
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    if truncate:
        scaled = _truncate(scaled, sampling.top_k, sampling.top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn)


def _truncate(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf for all but the k most likely, then for all that have a share of top_p or more before them.

    A token as likely as the last one kept is kept too.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where((top_k == 0) | (rank < top_k), ordered, -jnp.inf)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    # The most likely token is always kept; with top_p = 1 rounding in the sum must not cut the tail.
    kept = (rank == 0) | (before < top_p) | (top_p >= 1)
    last = jnp.min(jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)

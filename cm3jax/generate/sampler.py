"""Drawing the next token: temperature, top-k, top-p, min-p, repetition penalty, greedy.

The draw of a row is the largest of its logits plus noise that depends on the request's seed, the token's position and
the id alone (the Gumbel-max trick): neither the company in the batch nor the number of devices has a part in it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from cm3jax.generate.thresholds import largest, nucleus
from cm3jax.tokens.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 for all.
      top_p: only the most likely tokens that together hold this share of the probability (arXiv 1904.09751).
      min_p: only tokens at least this share as likely as the most likely one (arXiv 2407.01082).
      repetition_penalty: divides positive and multiplies negative logits of text that was seen (arXiv 1909.05858,
        section 4.1); image codes are never penalised.

    Raises:
      ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling: temperature must be >= 0 and finite, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"sampling: top_k must be >= 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must be in (0, 1], found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling: min_p must be in [0, 1], found {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"sampling: repetition_penalty must be > 0 and finite, found {self.repetition_penalty}")

    @property
    def cuts(self) -> frozenset[str]:
        """The fields by which tokens are cut off."""
        used = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return frozenset(name for name, cuts in used.items() if cuts and self.draws)

    @property
    def draws(self) -> bool:
        """Whether chance has a part."""
        return self.temperature > 0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The fields of `SamplingConfig` for each row, so that other values need no new compilation."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]


def per_row(configs: Sequence[SamplingConfig]) -> Sampling:
    """One row for each config."""
    fields = dataclasses.fields(SamplingConfig)
    types: dict[Any, Any] = {float: jnp.float32, int: jnp.int32}
    return Sampling(*(jnp.array([getattr(config, f.name) for config in configs], types[f.type]) for f in fields))


def noise(
    seeds: UInt32[Array, " B"], positions: Int[Array, " B"], ids: tuple[int, int], vocabulary: Vocabulary
) -> Float[Array, "B V"]:
    """Standard Gumbel noise of the ids in [first, end) of `ids`, for the token at `positions` of each request.

    Images and everything else have noise of their own, so that a program that knows image codes alone draws the same.
    """
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)

    def row(key: jax.Array) -> Float[Array, " V"]:
        images = jax.random.gumbel(jax.random.fold_in(key, 0), (vocabulary.image_size,))
        if ids == (vocabulary.image_start, vocabulary.image_end):
            return images
        others = jax.random.gumbel(jax.random.fold_in(key, 1), (vocabulary.size - vocabulary.image_size,))
        texts, marks = others[: vocabulary.image_start], others[vocabulary.image_start :]
        return jnp.concatenate([texts, images, marks])[ids[0] : ids[1]]

    return jax.vmap(row)(keys)


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Logits of ids that were seen, made less likely by `penalty` > 1."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def shape(logits: Float[Array, "B V"], sampling: Sampling, cuts: frozenset[str]) -> Float[Array, "B V"]:
    """The logits that are drawn from: divided by the temperature, and -inf for what is cut off.

    Of what the temperature makes, first the k most likely are kept, then the nucleus of those, then what min-p leaves;
    a token as likely as the last one kept is kept too. Rows of temperature 0 keep their logits.

    Args:
      cuts: static; those of all rows together (`SamplingConfig.cuts`). The others are left out.
    """
    greedy = (sampling.temperature == 0)[:, None]
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature[:, None])
    if "top_k" in cuts:
        width = logits.shape[-1]
        kept = largest(scaled, jnp.where(sampling.top_k == 0, width, jnp.minimum(sampling.top_k, width)))
        scaled = jnp.where(kept, scaled, -jnp.inf)
    if "top_p" in cuts:
        scaled = jnp.where(nucleus(scaled, sampling.top_p), scaled, -jnp.inf)
    if "min_p" in cuts:
        lowest = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
        scaled = jnp.where(scaled >= lowest, scaled, -jnp.inf)
    return jnp.where(greedy, logits, scaled)


def draw(
    logits: Float[Array, "B V"], noise: Float[Array, "B V"] | None, sampling: Sampling, cuts: frozenset[str]
) -> Int[Array, " B"]:
    """One index a row; of those with logit -inf none is ever drawn.

    Args:
      noise: None where every row is greedy.
    """
    if noise is None:
        return _first_largest(logits)
    drawn = shape(logits, sampling, cuts) + jnp.where(sampling.temperature[:, None] == 0, 0.0, noise)
    return _first_largest(drawn)


def _first_largest(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """As `argmax`, in two reductions of one array each: for those of two at once XLA has no vectors on CPUs."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, ids[-1]), axis=-1)

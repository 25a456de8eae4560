"""Which sample each token of a packed sequence belongs to, read off the tokens themselves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cm3jax.tokens.vocabulary import Vocabulary

PADDING = -1


def samples_of(tokens: Int[Array, "B T"], vocabulary: Vocabulary) -> Int[Array, "B T"]:
    """The number of each token's sample, in order of appearance; `PADDING` for padding.

    A sample stands between two `</s>`; where a sequence begins within one, what is there of it has number 0 and the
    first that begins has number 1. An infill at the end of the sequence belongs to the sample of its hole.
    """
    ends = tokens == vocabulary.eos
    before = jnp.concatenate([jnp.ones_like(ends[:, :1]), ends[:, :-1]], axis=1)
    samples = jnp.cumsum(ends & before, axis=1)

    marks = vocabulary.is_sentinel(tokens)
    numbers = jnp.where(marks, tokens - vocabulary.sentinel_start, 0)
    # The second `<sentinel:0>` opens the infills.
    infilling = jnp.cumsum(marks & (numbers == 0), axis=1) > 1
    current = jax.lax.cummax(jnp.where(infilling, numbers, 0), axis=1)
    rows = jnp.arange(tokens.shape[0])[:, None]
    holes = jnp.zeros((tokens.shape[0], vocabulary.sentinels), samples.dtype)
    holes = holes.at[rows, numbers].max(jnp.where(marks & ~infilling, samples, 0))
    samples = jnp.where(infilling, holes[rows, current], samples)
    return jnp.where(tokens == vocabulary.pad, PADDING, samples)

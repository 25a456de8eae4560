"""Several codes of an image in one step, with the ids that one code a step would give.

A step guesses the codes ahead, runs the model over all guesses at once, and draws at each place as if the guesses
before it were true. The first draw is right in any case; each further one is right if the guess before it was what has
been drawn there. What was drawn at the other places are the next guesses (Jacobi decoding, arXiv 2305.10427; for
sampled images arXiv 2410.01699).

The noise of a draw is a function of seed and position alone, so a guess is verified by comparing ids: nothing is
accepted by chance, and the result is that of plain decoding, not merely its distribution.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cm3jax.generate.cache import StreamCaches
from cm3jax.generate.grammar import GrammarState
from cm3jax.generate.rows import Rows, Standing
from cm3jax.generate.step import COMPILER_OPTIONS, Plan, choose
from cm3jax.generate.weights import Decoder
from cm3jax.parallel.specs import constrain, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """Of the loop over steps. `guesses` are of the W - 1 ids after `at.last`."""

    step: Int[Array, ""]
    caches: StreamCaches
    at: Standing
    guesses: Int[Array, "B ahead"]
    drawn: Int[Array, "B new"]
    log_probs: Float[Array, "B new"]


@functools.partial(
    jax.jit, static_argnames=("plan", "window"), donate_argnames="caches", compiler_options=COMPILER_OPTIONS
)
def advance_images(
    decoder: Decoder, caches: StreamCaches, rows: Rows, at: Standing, steps: Int[Array, ""], plan: Plan, window: int
) -> tuple[StreamCaches, Standing, Int[Array, "B new"], Float[Array, "B new"], Int[Array, ""]]:
    """As `step.advance`, for rows that all draw images; up to `window` ids in each step.

    Returns:
      as `step.advance`, with the ids that count at the front of each row.
    """
    count, streams = at.positions.shape
    decoder = decoder.restricted(plan.ids)
    before = at.number
    several = jax.tree.map(lambda x: jnp.repeat(x, window, axis=0), rows)

    def body(carry: _Carry) -> _Carry:
        at = carry.at
        guesses = jnp.repeat(carry.guesses[:, None], streams, axis=1)
        tokens = jnp.concatenate([at.last[:, :, None], guesses], axis=2).reshape(-1, window)
        positions = (at.positions[:, :, None] + jnp.arange(window)).reshape(-1, window)
        hidden, caches = decoder.decode(tokens, carry.caches, positions)
        logits = decoder.logits(hidden).reshape(count, streams, window, -1)
        logits = constrain(jnp.swapaxes(logits, 1, 2).reshape(count * window, streams, -1), "residual")
        found, log_probs = (x.reshape(count, window) for x in choose(logits, several, _ahead(at, window), plan))
        right = jnp.cumprod(carry.guesses == found[:, :-1], axis=1)
        accepted = jnp.minimum(1 + jnp.sum(right, axis=1), rows.limits - at.number)
        accepted = jnp.where(at.grammar.done, 0, accepted)
        places = (at.number - before)[:, None] + jnp.arange(window)
        places = jnp.where(jnp.arange(window) < accepted[:, None], places, carry.drawn.shape[1])
        row = jnp.arange(count)[:, None]
        return _Carry(
            step=carry.step + 1,
            caches=caches,
            at=replicated(_moved(at, rows, found, accepted)),
            guesses=replicated(_shifted(found, accepted)),
            drawn=replicated(carry.drawn.at[row, places].set(found, mode="drop")),
            log_probs=replicated(carry.log_probs.at[row, places].set(log_probs, mode="drop")),
        )

    def unfinished(carry: _Carry) -> Bool[Array, ""]:
        return (carry.step < steps) & ~jnp.all(carry.at.grammar.done)

    shape = (count, plan.chunk * window)
    guesses = jnp.repeat(at.last[:, :1], window - 1, axis=1)
    start = _Carry(jnp.int32(0), caches, at, guesses, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    end = jax.lax.while_loop(unfinished, body, start)
    return end.caches, end.at, end.drawn, end.log_probs, end.step


def _ahead(at: Standing, window: int) -> Standing:
    """Each row `window` times, each time one id further on in its image."""
    ahead = jnp.tile(jnp.arange(window), len(at.number))
    repeated = jax.tree.map(lambda x: jnp.repeat(x, window, axis=0), at)
    return dataclasses.replace(
        repeated,
        number=repeated.number + ahead,
        positions=repeated.positions + ahead[:, None],
        grammar=GrammarState(jnp.maximum(repeated.grammar.phase - ahead, 1), repeated.grammar.done),
    )


def _moved(at: Standing, rows: Rows, found: Int[Array, "B W"], accepted: Int[Array, " B"]) -> Standing:
    """Each row as many ids on as were accepted."""
    last = jnp.take_along_axis(found, jnp.maximum(accepted - 1, 0)[:, None], axis=1)
    number = at.number + accepted
    return dataclasses.replace(
        at,
        number=number,
        last=jnp.where((accepted > 0)[:, None], last, at.last),
        positions=at.positions + accepted[:, None],
        grammar=GrammarState(at.grammar.phase - accepted, at.grammar.done | (number >= rows.limits)),
    )


def _shifted(found: Int[Array, "B W"], accepted: Int[Array, " B"]) -> Int[Array, "B ahead"]:
    """What was drawn after the last accepted id; its last one again where there is no more."""
    window = found.shape[1]
    places = jnp.minimum(accepted[:, None] + jnp.arange(window - 1), window - 1)
    return jnp.take_along_axis(found, places, axis=1)

"""The compiled part of decoding: so many steps for all rows of a batch, each step one id a row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cm3jax.generate.cache import CacheKind, KVCache, StreamCaches
from cm3jax.generate.grammar import Grammar
from cm3jax.generate.guidance import at_share, contrast, mix
from cm3jax.generate.request import FREE
from cm3jax.generate.rows import Rows, Standing
from cm3jax.generate.sampler import draw, noise, penalise
from cm3jax.generate.weights import Decoder
from cm3jax.models.config import TransformerConfig
from cm3jax.parallel.specs import constrain, replicated


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a step: what a new value of compiles anew.

    Nothing here changes what any row gets; it leaves out work that no row of the batch needs.

    Attributes:
      ids: only ids in [first, end) can come next.
      cuts: of all rows together, see `SamplingConfig`.
      draws, contrasts, penalises: whether any row does.
      chunk: the most steps of one call.
    """

    grammar: Grammar
    ids: tuple[int, int]
    cuts: frozenset[str]
    draws: bool
    contrasts: bool
    penalises: bool
    chunk: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """Of the loop over steps."""

    step: Int[Array, ""]
    caches: StreamCaches
    at: Standing
    drawn: Int[Array, "B chunk"]
    log_probs: Float[Array, "B chunk"]


# XLA for GPUs would join products of the same vectors with small matrices, and to that end copy these in each step.
COMPILER_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="caches", compiler_options=COMPILER_OPTIONS)
def advance(
    decoder: Decoder, caches: StreamCaches, rows: Rows, at: Standing, steps: Int[Array, ""], plan: Plan
) -> tuple[StreamCaches, Standing, Int[Array, "B chunk"], Float[Array, "B chunk"], Int[Array, ""]]:
    """Up to `steps` ids for each row, fewer where all rows are done.

    Returns:
      caches, standing, for each step the ids and their log-probabilities (those of a row that was done before the
      step mean nothing), and the number of steps.
    """
    count, streams = at.positions.shape
    decoder = decoder.restricted(plan.ids)

    def body(carry: _Carry) -> _Carry:
        at = carry.at
        tokens, positions = at.last.reshape(-1, 1), at.positions.reshape(-1, 1)
        hidden, caches = decoder.decode(tokens, carry.caches, positions)
        logits = constrain(decoder.logits(hidden[:, 0]), "logits").reshape(count, streams, -1)
        drawn, log_probs = choose(logits, rows, at, plan)
        return _Carry(
            step=carry.step + 1,
            caches=caches,
            at=replicated(_moved(at, rows, drawn, plan)),
            drawn=replicated(carry.drawn.at[:, carry.step].set(drawn)),
            log_probs=replicated(carry.log_probs.at[:, carry.step].set(log_probs)),
        )

    def unfinished(carry: _Carry) -> Bool[Array, ""]:
        return (carry.step < steps) & ~jnp.all(carry.at.grammar.done)

    shape = (count, plan.chunk)
    start = _Carry(jnp.int32(0), caches, at, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    end = jax.lax.while_loop(unfinished, body, start)
    return end.caches, end.at, end.drawn, end.log_probs, end.step


def choose(
    logits: Float[Array, "B streams V"], rows: Rows, at: Standing, plan: Plan
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next id of each row and its log-probability, see `Completion.log_probs`."""
    first, end = plan.ids
    phase = at.grammar.phase
    in_image = phase > 0
    legal = plan.grammar.allowed(phase, rows.endings, jnp.arange(first, end))
    conditional = jnp.where(legal, logits[:, 0], -jnp.inf)
    guided = conditional
    if logits.shape[1] > 1:
        share = jnp.where(in_image, 1 - (phase - 1) / max(plan.grammar.image_tokens - 1, 1), 0.0)
        guided = jnp.where(legal, mix(logits, at_share(rows.weights, rows.last_weights, share)), -jnp.inf)
    if plan.contrasts:
        amateur, c = jnp.where(legal, logits[:, 1], -jnp.inf), rows.contrast
        scores = contrast(conditional, amateur, c.alpha, c.k, c.amateur_temperature)
        guided = jnp.where(c.on[:, None], scores, guided)
    sampling = jax.tree.map(lambda image, text: jnp.where(in_image, image, text), rows.image, rows.text)
    if plan.penalises:
        penalty = jnp.where(in_image, 1.0, sampling.repetition_penalty)
        guided = penalise(guided, at.seen[:, first:end], penalty)
    drawn = first + draw(guided, _noise(rows, at, plan), sampling, plan.cuts)
    if rows.forced.shape[1]:
        width = rows.forced.shape[1]
        forced = jnp.take_along_axis(rows.forced, jnp.minimum(at.number, width - 1)[:, None], axis=1)[:, 0]
        drawn = jnp.where((at.number < width) & (forced != FREE), forced, drawn)
    log_probs = jax.nn.log_softmax(conditional, axis=-1)
    return drawn, jnp.take_along_axis(log_probs, drawn[:, None] - first, axis=1)[:, 0]


def _noise(rows: Rows, at: Standing, plan: Plan) -> Float[Array, "B V"] | None:
    if not plan.draws:
        return None
    # The position of the token itself, not of the one that is fed.
    return noise(rows.seeds, at.positions[:, 0] + 1, plan.ids, plan.grammar.vocabulary)


def _moved(at: Standing, rows: Rows, drawn: Int[Array, " B"], plan: Plan) -> Standing:
    """One step on for all rows that are not done."""
    done = at.grammar.done
    number = at.number + ~done
    grammar = plan.grammar.advance(at.grammar, rows.endings, drawn)
    grammar = dataclasses.replace(grammar, done=grammar.done | (number >= rows.limits))
    grammar = jax.tree.map(lambda old, new: jnp.where(done, old, new), at.grammar, grammar)
    seen = at.seen
    if plan.penalises:
        seen = seen.at[jnp.arange(len(drawn)), drawn].set(True)
    return Standing(
        number=number,
        last=jnp.where(done[:, None], at.last, drawn[:, None]),
        positions=at.positions + ~done[:, None],
        grammar=grammar,
        seen=seen,
    )


@functools.partial(jax.jit, static_argnames=("config", "rows", "capacity", "kind"))
def empty(config: TransformerConfig, rows: int, capacity: int, kind: CacheKind) -> KVCache:
    """`KVCache.zeros`, laid out on the mesh."""
    return _laid_out(KVCache.zeros(config, rows, capacity, kind))


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(decoder: Decoder, cache: KVCache, tokens: Int[Array, "B T"], start: Int[Array, ""]) -> KVCache:
    """Keys and values of T more ids of each prompt, the first of them at position `start`."""
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.decode(tokens, cache, positions)[1]


@functools.partial(jax.jit, donate_argnames="cache")
def fill(cache: KVCache, pairs: Int[Array, "N 2"], source: KVCache) -> KVCache:
    """Rows of a batch from rows of `source`, given as (row, row of source); rows past the end are dropped."""
    return _laid_out(cache.filled(pairs[:, 0], source, pairs[:, 1]))


@functools.partial(jax.jit, static_argnames="capacity")
def resize(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with another capacity."""
    return _laid_out(cache.resized(capacity))


def _laid_out(cache: KVCache) -> KVCache:
    return jax.tree.map(lambda x: constrain(x, "cache") if x.ndim == 4 else x, cache)

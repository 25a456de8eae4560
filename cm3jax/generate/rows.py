"""The rows of a decoding batch as arrays: what each request asked for, and where each stands."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from cm3jax.generate.grammar import Grammar, GrammarState
from cm3jax.generate.guidance import ContrastiveTopK
from cm3jax.generate.request import FREE, Request
from cm3jax.generate.sampler import Sampling, per_row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrast:
    """`ContrastiveTopK` of each row, and whether it has one."""

    on: Bool[Array, " B"]
    alpha: Float[Array, " B"]
    k: Int[Array, " B"]
    amateur_temperature: Float[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What stays the same until a row is given to another request."""

    seeds: UInt32[Array, " B"]
    limits: Int[Array, " B"]
    endings: Bool[Array, "B 3"]
    text: Sampling
    image: Sampling
    weights: Float[Array, "B streams"]
    last_weights: Float[Array, "B streams"]
    contrast: Contrast
    forced: Int[Array, "B F"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standing:
    """Where each row stands.

    Attributes:
      number: ids drawn so far.
      last: the id of each stream that is fed next, at its `positions`.
      seen: ids of the prompt and of what was drawn; no columns where no row has a penalty.
    """

    number: Int[Array, " B"]
    last: Int[Array, "B streams"]
    positions: Int[Array, "B streams"]
    grammar: GrammarState
    seen: Bool[Array, "B V"]


def rows_of(requests: Sequence[Request | None], grammar: Grammar, streams: int) -> Rows:
    """One row for each request; an empty row for None."""
    empty = Request(((0,),), "text", max_new=1)
    filled = [request or empty for request in requests]
    # As wide as an image where any row is forced, so that few widths are compiled.
    longest = max(len(request.forced) for request in filled)
    forced = np.full((len(filled), max(longest, grammar.image_tokens) if longest else 0), FREE, np.int32)
    for row, request in zip(forced, filled, strict=True):
        row[: len(request.forced)] = request.forced
    guidance = [request.guidance for request in filled]
    contrasts = [g.contrast or ContrastiveTopK() for g in guidance]
    return Rows(
        seeds=jnp.array([request.seed for request in filled], jnp.uint32),
        limits=jnp.array([request.limit(grammar) for request in filled], jnp.int32),
        endings=jnp.array([request.endings() for request in filled]),
        text=per_row([request.text for request in filled]),
        image=per_row([request.image for request in filled]),
        weights=_weights([g.weights for g in guidance], streams),
        last_weights=_weights([g.last or g.weights for g in guidance], streams),
        contrast=Contrast(
            on=jnp.array([g.contrast is not None for g in guidance]),
            alpha=jnp.array([c.alpha for c in contrasts], jnp.float32),
            k=jnp.array([c.k for c in contrasts], jnp.int32),
            amateur_temperature=jnp.array([c.amateur_temperature for c in contrasts], jnp.float32),
        ),
        forced=jnp.asarray(forced),
    )


def no_standing(rows: int, streams: int, seen: int) -> Standing:
    """Rows that belong to nobody, as NumPy's arrays: the host writes into them."""
    zeros: Any = np.zeros
    return Standing(
        number=zeros(rows, np.int32),
        last=zeros((rows, streams), np.int32),
        positions=zeros((rows, streams), np.int32),
        grammar=GrammarState(zeros(rows, np.int32), ~zeros(rows, bool)),
        seen=zeros((rows, seen), bool),
    )


def enter(standing: Any, row: int, request: Request, grammar: Grammar) -> None:
    """Puts a request at its beginning, in the (NumPy) arrays of `standing`: the last id of the prompt is fed first."""
    prompts = request.streams
    standing.number[row] = 0
    standing.last[row, : len(prompts)] = [prompt[-1] for prompt in prompts]
    standing.positions[row] = 0
    standing.positions[row, : len(prompts)] = [len(prompt) - 1 for prompt in prompts]
    standing.grammar.phase[row] = request.phase(grammar)
    standing.grammar.done[row] = False
    if standing.seen.shape[1]:
        standing.seen[row] = False
        standing.seen[row, list(prompts[0])] = True


def _weights(weights: Sequence[tuple[float, ...]], streams: int) -> Float[Array, "B streams"]:
    table = np.zeros((len(weights), streams), np.float32)
    for row, given in zip(table, weights, strict=True):
        row[: len(given)] = given
    return jnp.asarray(table)

"""Generation of a batch: prefill all prompts at once, then one token a step for all rows.

A request may have several streams (conditional, unconditional, ...): rows of the batch with different prompts that are
fed the same tokens and whose logits are mixed. Rows are padded on the right and a cache slot is a position, so neither
padding nor the company in the batch changes what a request gets.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from cm3jax.generate.cache import KVCache
from cm3jax.generate.grammar import INFILL, TEXT, Grammar, GrammarState
from cm3jax.generate.guidance import mix
from cm3jax.generate.sampler import Sampling, SamplingConfig, row_keys, sample
from cm3jax.tokens.vocabulary import Vocabulary

PROMPT_BUCKET = 64
Prompts = Sequence[Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Batch:
    """What stays the same while a batch is decoded; rows are ordered stream by stream."""

    lengths: Int[Array, " rows"]  # of the prompts
    weights: Float[Array, " streams"]
    seeds: UInt32[Array, " B"]
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """The loop's carry."""

    number: Int[Array, ""]  # of the token that is drawn next
    last: Int[Array, " rows"]  # the token that is fed next
    cache: KVCache
    grammar: GrammarState
    drawn: Int[Array, "B new"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a decoding loop: what a new value of compiles anew."""

    grammar: Grammar
    ids: tuple[int, int]  # only logits of this range are computed
    truncate: bool


class Generator:
    """Images and text from prompts of ids.

    Args:
      graphdef, params: of a `Transformer`, `params` as a nested dict.
      image_tokens: codes of one image.
    """

    def __init__(self, graphdef: nnx.GraphDef, params: Any, vocabulary: Vocabulary, image_tokens: int):
        self.config = nnx.merge(graphdef, params).config
        self.params = params
        self.vocabulary = vocabulary
        self.image_tokens = image_tokens
        if vocabulary.size > self.config.vocab_size:
            raise ValueError(
                f"generator: a vocabulary of {vocabulary.size} ids for a model of {self.config.vocab_size}"
            )
        self._prefill = jax.jit(functools.partial(_prefill, graphdef), static_argnames="capacity")
        self._decode = jax.jit(functools.partial(_decode, graphdef), static_argnames="plan", donate_argnames="progress")

    def generate_images(
        self,
        streams: Sequence[Prompts],
        weights: Sequence[float],
        sampling: SamplingConfig,
        seeds: Sequence[int],
    ) -> Int[np.ndarray, "N image_tokens"]:
        """Codes of one image for each request.

        Args:
          streams: for each stream the prompts of all N requests, such that an image comes next (see `infill`).
          weights: of the streams (see `guidance`); `(1.0,)` for one stream without guidance.
          seeds: one for each request; equal request and seed give the equal image.

        Raises:
          ValueError: numbers of prompts, seeds, weights that do not match; an empty, too long or foreign prompt.
        """
        vocabulary = self.vocabulary
        plan = _Plan(
            Grammar(vocabulary, self.image_tokens, endings=(vocabulary.eos,)),
            ids=(vocabulary.image_start, vocabulary.image_end),
            truncate=sampling.truncates,
        )
        drawn, _ = self._generate(streams, weights, sampling, seeds, plan, self.image_tokens, self.image_tokens)
        return vocabulary.image_code(drawn)

    def generate_text(
        self, prompts: Prompts, sampling: SamplingConfig, seeds: Sequence[int], max_new: int
    ) -> list[list[int]]:
        """Text ids, at least one, for each prompt, up to `<break>`, `<eoss>` or `</s>` (not included) or `max_new` ids.

        Raises:
          ValueError: as `generate_images`.
        """
        vocabulary = self.vocabulary
        endings = (vocabulary.break_id, vocabulary.eoss, vocabulary.eos)
        return self._continue(prompts, sampling, seeds, max_new, endings, INFILL)

    def generate_document(
        self, prompts: Prompts, sampling: SamplingConfig, seeds: Sequence[int], max_new: int
    ) -> list[list[int]]:
        """Text and whole images for each prompt that ends in text, up to `</s>` (not included) or `max_new` ids.

        Raises:
          ValueError: as `generate_images`.
        """
        return self._continue(prompts, sampling, seeds, max_new, (self.vocabulary.eos,), TEXT)

    def _continue(
        self,
        prompts: Prompts,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        max_new: int,
        endings: tuple[int, ...],
        phase: int,
    ) -> list[list[int]]:
        if max_new < 1:
            raise ValueError(f"generate: max_new must be >= 1, found {max_new}")
        plan = _Plan(
            Grammar(self.vocabulary, self.image_tokens, endings), (0, self.vocabulary.used), sampling.truncates
        )
        drawn, lengths = self._generate([prompts], (1.0,), sampling, seeds, plan, phase, max_new)
        return [row[:length].tolist() for row, length in zip(drawn, lengths, strict=True)]

    def _generate(
        self,
        streams: Sequence[Prompts],
        weights: Sequence[float],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        plan: _Plan,
        phase: int,
        max_new: int,
    ) -> tuple[Int[np.ndarray, "N new"], Int[np.ndarray, " N"]]:
        """The drawn ids and how many of each row count."""
        _check_counts(streams, weights, seeds)
        prompts = [prompt for stream in streams for prompt in stream]
        self._check_prompts(prompts, max_new)
        requests = len(seeds)
        if requests == 0:
            return np.zeros((0, max_new), np.int32), np.zeros(0, np.int32)

        tokens, lengths = _pad(prompts, self.vocabulary.pad, self.config.max_len)
        capacity = min(tokens.shape[1] + max_new, self.config.max_len)
        progress = _Progress(
            number=jnp.int32(0),
            last=jnp.asarray(tokens[np.arange(len(prompts)), lengths - 1]),
            cache=self._prefill(self.params, tokens, capacity=capacity),
            grammar=plan.grammar.start(requests, phase),
            drawn=jnp.full((requests, max_new), self.vocabulary.pad, jnp.int32),
        )
        batch = _Batch(
            lengths=jnp.asarray(lengths),
            weights=jnp.asarray(weights, jnp.float32),
            seeds=jnp.asarray(seeds, jnp.uint32),
            sampling=sampling.arrays(),
        )
        drawn = np.asarray(self._decode(self.params, batch, progress=progress, plan=plan).drawn)
        ended = np.isin(drawn, (*plan.grammar.endings, self.vocabulary.pad))
        return drawn, np.where(ended.any(axis=1), ended.argmax(axis=1), max_new)

    def _check_prompts(self, prompts: Prompts, max_new: int) -> None:
        limit = self.config.max_len
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"generate: prompt {i} is empty; a prompt begins with at least one id, such as </s>")
            if len(prompt) + max_new > limit:
                raise ValueError(
                    f"generate: prompt {i} of {len(prompt)} ids leaves no room for {max_new} new ones in {limit}"
                )
            if min(prompt) < 0 or max(prompt) >= self.vocabulary.size:
                bad = next(t for t in prompt if not 0 <= t < self.vocabulary.size)
                raise ValueError(f"generate: prompt {i} holds id {bad}, expected 0 <= id < {self.vocabulary.size}")


def _check_counts(streams: Sequence[Prompts], weights: Sequence[float], seeds: Sequence[int]) -> None:
    if len(streams) != len(weights) or not streams:
        raise ValueError(f"generate: {len(streams)} streams for {len(weights)} guidance weights")
    for i, stream in enumerate(streams):
        if len(stream) != len(seeds):
            raise ValueError(f"generate: stream {i} has {len(stream)} prompts for {len(seeds)} seeds")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"generate: seed {seed}, expected 0 <= seed < 2^32")


def _pad(prompts: Prompts, pad: int, limit: int) -> tuple[Int[np.ndarray, "rows P"], Int[np.ndarray, " rows"]]:
    """Prompts padded on the right to a common multiple of PROMPT_BUCKET, so that few shapes are compiled."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = min(-(-int(lengths.max()) // PROMPT_BUCKET) * PROMPT_BUCKET, limit)
    tokens = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _prefill(graphdef: nnx.GraphDef, params: Any, tokens: Int[Array, "rows P"], capacity: int) -> KVCache:
    """Keys and values of the prompts; slots from a prompt's last token on are overwritten by the decoding loop."""
    model = nnx.merge(graphdef, params)
    rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
    return model.decode(tokens, KVCache.zeros(model.config, rows, capacity), positions)[1]


def _decode(graphdef: nnx.GraphDef, params: Any, batch: _Batch, progress: _Progress, plan: _Plan) -> _Progress:
    """Draws until every row is done or full; begins by feeding the last token of each prompt."""
    model = nnx.merge(graphdef, params)
    first, end = plan.ids
    unembedding = model.unembedding()[first:end]
    ids = jnp.arange(first, end)
    streams, requests, max_new = batch.weights.shape[0], batch.seeds.shape[0], progress.drawn.shape[1]

    def step(at: _Progress) -> _Progress:
        positions = (batch.lengths - 1 + at.number)[:, None]
        hidden, cache = model.decode(at.last[:, None], at.cache, positions)
        logits = jnp.einsum(
            "rd,vd->rv", hidden[:, 0], unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        mixed = mix(logits.reshape(streams, requests, -1), batch.weights)
        mixed = jnp.where(plan.grammar.allowed(at.grammar, ids), mixed, -jnp.inf)
        tokens = first + sample(row_keys(batch.seeds, at.number), mixed, batch.sampling, plan.truncate)
        tokens = jnp.where(at.grammar.done, plan.grammar.vocabulary.pad, tokens)
        return _Progress(
            number=at.number + 1,
            last=jnp.tile(tokens, streams),
            cache=cache,
            grammar=plan.grammar.advance(at.grammar, tokens),
            drawn=at.drawn.at[:, at.number].set(tokens),
        )

    def unfinished(at: _Progress) -> Array:
        return (at.number < max_new) & ~jnp.all(at.grammar.done)

    return jax.lax.while_loop(unfinished, step, progress)

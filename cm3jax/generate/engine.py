"""Generation of any number of requests in a batch of fixed shape: prefill, decode, refill.

Rows that end are given to the next request of the queue. A cache slot is a position, the draw depends on the request's
seed and the position alone, and no row reads another, so neither the company in the batch nor the order of the requests
changes what a request gets.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cm3jax.generate.cache import CacheKind, KVCache, StreamCaches
from cm3jax.generate.grammar import Grammar
from cm3jax.generate.jacobi import advance_images
from cm3jax.generate.prefill import Prompt, Prompts
from cm3jax.generate.request import Completion, Request, refusal
from cm3jax.generate.rows import enter, no_standing, rows_of
from cm3jax.generate.sizes import multiple, power_of_two, slots
from cm3jax.generate.step import Plan, advance, empty, fill, resize
from cm3jax.generate.weights import WeightKind, prepare
from cm3jax.parallel.mesh import one_device
from cm3jax.parallel.specs import BATCH
from cm3jax.tokens.vocabulary import Vocabulary

Done = Callable[[int, Completion], None]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a batch is decoded; all but `weights` and `cache` change the speed alone.

    Attributes:
      rows: requests at a time, at most.
      chunk: steps between two looks of the host.
      prefill_chunk: ids of prompts that are read at once.
      smallest_cache: slots; a cache grows when a row reaches its end, see `sizes`.
      window: codes that are drawn in one step where all rows draw images (see `jacobi`); 1 is plain decoding.
      weights, cache: "int8" holds the matrices, or keys and values, in bytes.
    """

    rows: int = 16
    chunk: int = 64
    prefill_chunk: int = 256
    smallest_cache: int = 64
    window: int = 1
    weights: WeightKind = "compute"
    cache: CacheKind = "compute"


USUAL = EngineConfig()


class Engine:
    """Ids from ids.

    Attributes:
      steps: how often the model has run to draw, prefill apart.

    Args:
      graphdef, params: of a `Transformer`, `params` as a nested dict.
      image_tokens: codes of one image.
      text_end: text ids from here on are never drawn; by default all may be.
      mesh: by default the first device alone.

    Raises:
      ValueError: the model has fewer ids than the vocabulary.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        vocabulary: Vocabulary,
        image_tokens: int,
        text_end: int | None = None,
        config: EngineConfig = USUAL,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config = config
        self.mesh = mesh or one_device()
        self.grammar = Grammar(vocabulary, image_tokens, text_end or vocabulary.text_size)
        self.steps = 0
        self.decoder = prepare(graphdef, params, self.mesh, config.weights)
        if vocabulary.size > self.decoder.config.vocab_size:
            raise ValueError(
                f"engine: a vocabulary of {vocabulary.size} ids for a model of {self.decoder.config.vocab_size}"
            )

    @property
    def max_len(self) -> int:
        """Ids of a prompt and of what follows it, at most."""
        return self.decoder.config.max_len

    def run(self, requests: Sequence[Request], on_done: Done | None = None) -> list[Completion]:
        """One completion for each request, in their order; a request that cannot be served has its `error` set.

        Args:
          on_done: is told of each completion (with its place in `requests`) as soon as there is one.
        """
        results: dict[int, Completion] = {}

        def finish(place: int, completion: Completion) -> None:
            results[place] = completion
            if on_done is not None:
                on_done(place, completion)

        good = []
        for place, request in enumerate(requests):
            error = refusal(request, self.grammar, self.max_len)
            if error is None:
                good.append((place, request))
            else:
                finish(place, Completion([], np.zeros(0, np.float32), error=error))
        if good:
            with jax.set_mesh(self.mesh):
                _Batch(self, good, finish).run()
        return [results[place] for place in range(len(requests))]


class _Batch:
    """The requests of one call, and the rows that serve them."""

    def __init__(self, engine: Engine, requests: Sequence[tuple[int, Request]], finish: Done):
        self.engine, self.config, self.grammar, self.finish = engine, engine.config, engine.grammar, finish
        self.queue = collections.deque(requests)
        lanes = int(np.prod([engine.mesh.shape[axis] for axis in BATCH]))
        count = min(power_of_two(len(requests)), self.config.rows)
        count = multiple(count, lanes)
        self.streams = max(len(request.streams) for _, request in requests)
        self.penalises = any(request.text.penalises for _, request in requests)
        self.places: list[int] = [-1] * count
        self.requests: list[Request | None] = [None] * count
        self.drawn: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.log_probs: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.standing = no_standing(count, self.streams, self.grammar.vocabulary.size if self.penalises else 0)
        empty = [self._empty(count, self.config.smallest_cache) for _ in range(self.streams)]
        self.caches = StreamCaches(tuple(empty))
        self.prompts = Prompts(
            engine.decoder,
            self.config.rows,
            lanes,
            self.config.prefill_chunk,
            self.grammar.vocabulary.pad,
            self.config.cache,
        )

    def run(self) -> None:
        """Until the queue is empty and every row is done."""
        while True:
            if self._refill():
                self.rows = rows_of(self.requests, self.grammar, self.streams)
            if all(request is None for request in self.requests):
                return
            self._advance()
            self._collect()

    def _refill(self) -> bool:
        """Gives free rows to the queue; whether any row changed hands."""
        free = [row for row, request in enumerate(self.requests) if request is None]
        entered: list[list[tuple[int, Prompt]]] = [[] for _ in range(self.streams)]
        for row in free[: len(self.queue)]:
            place, request = self.queue.popleft()
            self.places[row], self.requests[row] = place, request
            self.drawn[row], self.log_probs[row] = [], []
            enter(self.standing, row, request, self.grammar)
            for stream, prompt in enumerate(request.streams):
                entered[stream].append((row, prompt))
        if not any(entered):
            return False
        self._fit()
        self.prompts.read([prompt for rows in entered for _, prompt in rows])
        for stream, rows in enumerate(entered):
            self._fill(stream, rows)
        self.prompts.keep({prompt for _, request in self.queue for prompt in request.streams})
        return True

    def _fill(self, stream: int, rows: Sequence[tuple[int, Prompt]]) -> None:
        """Prompts, which have been read, into the rows of a stream that begin with them."""
        read = [(row, self.prompts[prompt]) for row, prompt in rows if len(prompt) > 1]
        count, streams = len(self.requests), list(self.caches.streams)
        for cache in {id(place.cache): place.cache for _, place in read}.values():
            pairs = [(row, place.row) for row, place in read if place.cache is cache]
            # To one length, so that this is compiled once: what goes to a row past the end is dropped.
            pairs += [(count, 0)] * (count - len(pairs))
            streams[stream] = fill(streams[stream], np.array(pairs, np.int32), cache)
        self.caches = StreamCaches(tuple(streams))

    def _advance(self) -> None:
        """As many steps as make sense before the host looks again."""
        self._fit()
        at = self.standing
        live = ~at.grammar.done
        room = [c.capacity - int(p[live].max()) for c, p in zip(self.caches.streams, at.positions.T, strict=True)]
        plan, window = self._plan(), self._window()
        steps = min(self.config.chunk, max(1, min(room) // window))
        if self.queue:
            steps = min(steps, int((self.rows.limits - at.number)[live].min()))
        self.before = at
        inputs = self.engine.decoder, self.caches, self.rows, at, np.int32(steps), plan
        found = advance(*inputs) if window == 1 else advance_images(*inputs, window)
        self.caches, at, drawn, log_probs, steps_done = found
        self.engine.steps += int(steps_done)
        self.standing = jax.tree.map(np.array, at)
        self.chunk = np.asarray(drawn), np.asarray(log_probs)

    def _window(self) -> int:
        """Ids of a row that one step may give."""
        only_images = all(request is None or request.produce == "image" for request in self.requests)
        return self.config.window if only_images else 1

    def _plan(self) -> Plan:
        vocabulary = self.grammar.vocabulary
        requests = [request for request in self.requests if request is not None]
        only_images = all(request.produce == "image" for request in requests)
        samplings = [request.image for request in requests]
        if not only_images:
            samplings += [request.text for request in requests]
        return Plan(
            grammar=self.grammar,
            ids=(vocabulary.image_start, vocabulary.image_end) if only_images else (0, vocabulary.used),
            cuts=frozenset().union(*(sampling.cuts for sampling in samplings)),
            draws=any(sampling.draws for sampling in samplings),
            contrasts=any(request.guidance.contrast is not None for request in requests),
            penalises=self.penalises and not only_images,
            chunk=self.config.chunk,
        )

    def _collect(self) -> None:
        """Keeps what the last steps drew, and hands back the rows that are done."""
        drawn, log_probs = self.chunk
        for row, request in enumerate(self.requests):
            if request is None:
                continue
            new = int(self.standing.number[row] - self.before.number[row])
            self.drawn[row].append(drawn[row, :new])
            self.log_probs[row].append(log_probs[row, :new])
            if self.standing.grammar.done[row]:
                self.finish(self.places[row], self._completion(row, request))
                self.requests[row] = None

    def _completion(self, row: int, request: Request) -> Completion:
        ids = np.concatenate(self.drawn[row]).tolist()
        endings = [mark for mark, ends in zip(self.grammar.marks, request.endings(), strict=True) if ends]
        ended = ids[-1] in endings
        return Completion(ids[:-1] if ended else ids, np.concatenate(self.log_probs[row]), ended)

    def _fit(self) -> None:
        """Caches as long as the rows that are live need them for the next step, and not much longer."""
        at = self.standing
        live = ~at.grammar.done
        limits = np.array([0 if request is None else request.limit(self.grammar) for request in self.requests])
        fitted = []
        for cache, positions in zip(self.caches.streams, at.positions.T, strict=True):
            ends = positions + limits - at.number
            wanted = self._capacity(*(int(x[live].max()) + self.config.window for x in (positions, ends)))
            grows, halves = wanted > cache.capacity, 2 * wanted <= cache.capacity
            fitted.append(resize(cache, wanted) if grows or halves else cache)
        self.caches = StreamCaches(tuple(fitted))

    def _capacity(self, needed: int, at_last: int) -> int:
        return min(slots(needed, at_last, self.config.smallest_cache), self.engine.max_len)

    def _empty(self, rows: int, capacity: int) -> KVCache:
        return empty(self.engine.decoder.config, rows, capacity, self.config.cache)

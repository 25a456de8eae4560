"""Reading prompts: each once, however many rows begin with it, and short ones of like length together.

Prompts of one width are always read by the same program, however few they are: what is read does not depend, to the
last bit, on which others there are.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from cm3jax.generate.cache import CacheKind, KVCache
from cm3jax.generate.sizes import multiple, power_of_two
from cm3jax.generate.step import empty, prefill
from cm3jax.generate.weights import Decoder

Prompt = tuple[int, ...]
# Ids; a shorter prompt is read with padding, so that few lengths are compiled.
SHORTEST_READ = 16


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a prompt that was read lies: in one row of a cache that it shares with others."""

    cache: KVCache
    row: int


class Prompts:
    """Keys and values of prompts: of all but the last id, which the first step feeds.

    Args:
      rows: prompts that are read at once, at most.
      lanes: the number of rows is a multiple of this.
      chunk: ids that are read at once, of all prompts together.
      pad: an id to fill rows with.
    """

    def __init__(self, decoder: Decoder, rows: int, lanes: int, chunk: int, pad: int, kind: CacheKind):
        self._decoder, self._rows, self._lanes = decoder, rows, lanes
        self._chunk, self._pad, self._kind = chunk, pad, kind
        self._places: dict[Prompt, Place] = {}

    def __getitem__(self, prompt: Prompt) -> Place:
        return self._places[prompt]

    def read(self, prompts: Collection[Prompt]) -> None:
        """Those of two ids and more that have not been read."""
        by_width: dict[int, list[Prompt]] = {}
        for prompt in dict.fromkeys(prompts):
            if len(prompt) > 1 and prompt not in self._places:
                by_width.setdefault(self._width(prompt), []).append(prompt)
        for width, alike in by_width.items():
            rows = multiple(max(1, min(self._chunk // width, self._rows)), self._lanes)
            for start in range(0, len(alike), rows):
                self._read(alike[start : start + rows], rows, width)

    def keep(self, wanted: Collection[Prompt]) -> None:
        """Forgets all others."""
        self._places = {prompt: place for prompt, place in self._places.items() if prompt in wanted}

    def _width(self, prompt: Prompt) -> int:
        """Ids to which it is padded."""
        length = len(prompt) - 1
        return multiple(length, min(max(power_of_two(length), SHORTEST_READ), self._chunk))

    def _read(self, prompts: Sequence[Prompt], rows: int, width: int) -> None:
        tokens = np.full((rows, width), self._pad, np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt) - 1] = prompt[:-1]
        cache = empty(self._decoder.config, rows, width, self._kind)
        for start in range(0, width, self._chunk):
            cache = prefill(self._decoder, cache, tokens[:, start : start + self._chunk], np.int32(start))
        self._places |= {prompt: Place(cache, row) for row, prompt in enumerate(prompts)}

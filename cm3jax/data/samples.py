"""Samples of an epoch: which documents stand together, in shuffled order.

A sample is a query document with the documents retrieved for it in front. Nothing is read here: a sample is a row of
record ids.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from cm3jax.data.rng import Purpose, generator


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Rows of record ids, the query last: sample i is `records[offsets[i]:offsets[i + 1]]`."""

    offsets: Int64[np.ndarray, " N+1"]
    records: Int64[np.ndarray, " M"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Neighbours(Protocol):
    """Chooses the documents in front of each query."""

    fingerprint: str  # changes when the choice would

    def __call__(self, queries: Int64[np.ndarray, " Q"], rng: np.random.Generator) -> Int64[np.ndarray, "Q K"]:
        """Record ids in the order in which they stand before the query; -1 where there is none."""


def epoch_samples(
    sizes: Sequence[int], repeats: Sequence[float], seed: int, epoch: int, neighbours: Neighbours | None = None
) -> Samples:
    """The shuffled samples of one epoch, a pure function of its arguments.

    Args:
      sizes: records of each data set; record ids count through the data sets in this order.
      repeats: how often each record of a data set is a query in an epoch. The fractional part takes a random subset,
        another one each epoch: 2.25 is every record twice and a quarter of them a third time.
    """
    rng = generator(Purpose.SAMPLES, seed, epoch)
    starts = np.cumsum([0, *sizes])
    queries = np.concatenate(
        [start + _repeated(size, repeat, rng) for start, size, repeat in zip(starts[:-1], sizes, repeats, strict=True)]
    )
    rng.shuffle(queries)
    if neighbours is None:
        return Samples(np.arange(len(queries) + 1), queries)
    retrieved = neighbours(queries, generator(Purpose.NEIGHBOURS, seed, epoch))
    documents = np.concatenate([retrieved, queries[:, None]], axis=1)
    present = documents >= 0
    return Samples(np.concatenate([[0], np.cumsum(present.sum(axis=1))]), documents[present])


def _repeated(size: int, repeat: float, rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
    """Indices into a data set, each floor(repeat) times and round(size * fraction) random ones once more."""
    copies = int(repeat)
    extra = rng.choice(size, round(size * (repeat - copies)), replace=False, shuffle=False)
    return np.concatenate([np.tile(np.arange(size), copies), extra])

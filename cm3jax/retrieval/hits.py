"""What a search gives: the best rows of a bank for each query."""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int64


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """Rows of the bank, best first; equal scores by id. Where the bank has too few: id -1, score -inf."""

    ids: Int64[np.ndarray, "Q k"]
    scores: Float32[np.ndarray, "Q k"]


class Bank(Protocol):
    """Vectors by rows, as an array [N, D] has them; those of `embeddings.Column` stay on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Rows of a slice, or of an array of row numbers >= 0."""


class Backend(Protocol):
    """A bank that can be searched."""

    def search(
        self, queries: Float32[np.ndarray, "Q D"], k: int, exclude: Int64[np.ndarray, " Q"] | None = None
    ) -> Hits:
        """The k rows with the largest inner products with each query.

        Args:
          exclude: a row that a query must not find (itself); -1 for none.
        """


def hits_by_part(
    backend: Backend, vectors: Float32[np.ndarray, "Q D"], k: int, exclude: Int64[np.ndarray, " Q"] | None = None
) -> Hits:
    """Hits by one part of each query; none where the query has no such part (its vector is 0)."""
    hits = backend.search(vectors, k, exclude)
    there = np.any(vectors != 0, axis=1)[:, None]
    return Hits(np.where(there, hits.ids, -1), np.where(there, hits.scores, -np.inf).astype(np.float32))


def ordered(
    ids: Int64[np.ndarray, "Q C"], scores: Float32[np.ndarray, "Q C"], k: int, exclude: Int64[np.ndarray, " Q"]
) -> Hits:
    """The best k of C candidates by score, then by id; without `exclude` and without ids that stand twice."""
    scores = np.where((ids < 0) | (ids == exclude[:, None]), -np.inf, scores).astype(np.float32)
    order = np.lexsort((ids, -scores), axis=1)
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    twice = np.zeros(ids.shape, bool)
    twice[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & (scores[:, 1:] == scores[:, :-1])
    scores[twice] = -np.inf
    order = np.argsort(twice | np.isneginf(scores), axis=1, kind="stable")[:, :k]
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    missing = k - ids.shape[1]
    ids = np.pad(ids, ((0, 0), (0, max(0, missing))), constant_values=-1)
    scores = np.pad(scores, ((0, 0), (0, max(0, missing))), constant_values=-np.inf)
    return Hits(np.where(np.isneginf(scores), -1, ids), scores)

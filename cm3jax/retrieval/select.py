"""Which found documents a sample takes: pure functions of ids, scores and embeddings.

The rules are those of RA-CM3 (arXiv 2211.12561, section 3.1) as CM3Leon uses them (arXiv 2309.02591, section 2.1):
relevance is the encoder's score, only whole documents are taken, and near-duplicates are passed over.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

from cm3jax.retrieval.hits import Bank, Hits


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Thresholds; the defaults are the paper's where it names one.

    Attributes:
      max_score: a hit with a larger score is too much like the query ("only documents with score <= 0.9").
      min_score: a hit with a smaller one is not relevant.
      max_similarity: between two documents of one sample; the paper gives no figure for it, and uses 0.9 for the query.
      whole_documents: only documents with both text and image.
      by_image, by_text: hits that are kept of each kind of query.
      searched: hits that are looked at, of each kind.
      query_dropout: share of the query's tokens that are dropped before it is embedded.
    """

    max_score: float = 0.9
    min_score: float = -1.0
    max_similarity: float = 0.9
    whole_documents: bool = True
    by_image: int = 2
    by_text: int = 2
    searched: int = 32
    query_dropout: float = 0.2

    def __post_init__(self):
        if self.by_image < 0 or self.by_text < 0 or not self.by_image + self.by_text:
            raise ValueError(f"selection: by_image {self.by_image} and by_text {self.by_text}, expected >= 0, one > 0")
        if self.searched < max(self.by_image, self.by_text):
            raise ValueError(f"selection: searched {self.searched} is less than by_image or by_text")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"selection: query_dropout {self.query_dropout}, expected 0 <= query_dropout < 1")

    @property
    def candidates(self) -> int:
        """Documents of a record that are kept, at most."""
        return self.by_image + self.by_text


def relevant(hits: Hits, config: SelectionConfig) -> Bool[np.ndarray, "Q k"]:
    """Hits whose score says: of the same matter, but not the same."""
    return (hits.ids >= 0) & (hits.scores <= config.max_score) & (hits.scores >= config.min_score)


def whole(hits: Hits, complete: Bool[np.ndarray, " N"], config: SelectionConfig) -> Bool[np.ndarray, "Q k"]:
    """Hits that may be shown as they are; `complete`: which documents of the bank have text and image."""
    return (complete[hits.ids] | (not config.whole_documents)) & (hits.ids >= 0)


def distinct(
    ids: Int64[np.ndarray, " R"],
    vectors: Float[np.ndarray, "R D"],
    taken_ids: Int64[np.ndarray, "R T"],
    taken: Float[np.ndarray, "R T D"],
    max_similarity: float,
) -> Bool[np.ndarray, " R"]:
    """Which of R documents, each for a query of its own, are none of what their query took, nor nearly one of it.

    Args:
      vectors, taken: of length 1; 0 in `taken` where nothing was taken, and there -1 in `taken_ids`.
    """
    # In double precision and along the vectors alone, so that the number of queries changes no bit.
    similarity = np.multiply(taken, vectors[:, None], dtype=np.float64).sum(axis=2).astype(np.float32)
    nothing = ~taken.any(axis=2)
    return np.all((taken_ids != ids[:, None]) & ((similarity <= max_similarity) | nothing), axis=1)


def select(
    by_image: Hits,
    by_text: Hits,
    queries: Float[np.ndarray, "Q D"],
    bank: Bank,
    complete: Bool[np.ndarray, " N"],
    own: Int64[np.ndarray, " Q"],
    config: SelectionConfig,
) -> Hits:
    """The candidates of each query: of the hits by its image and of those by its text, as many as the rules leave.

    Hits are looked at best first, the same place of all queries at once; of the bank only those rows are read that
    the other rules leave.

    Args:
      by_image, by_text: hits of the query's parts.
      queries: the whole query document's embedding, of length 1.
      bank: embeddings [N, D] of all documents, of length 1.
      own: the bank's row of each query, -1 if it has none; it is never among its candidates.

    Returns:
      Hits [Q, by_image + by_text]: those by the image first, then those by the text; -1 where there is none.
    """
    # What each query took, itself first.
    ids = np.full((len(queries), 1 + config.candidates), -1, np.int64)
    scores = np.full(ids.shape, -np.inf, np.float32)
    taken = np.zeros((*ids.shape, queries.shape[1]), np.float32)
    ids[:, 0], taken[:, 0] = own, queries
    for hits, first, end in ((by_image, 1, 1 + config.by_image), (by_text, 1 + config.by_image, ids.shape[1])):
        allowed = relevant(hits, config) & whole(hits, complete, config)
        free = np.full(len(queries), first)
        for place in range(hits.ids.shape[1]):
            rows = np.flatnonzero(allowed[:, place] & (free < end))
            found = hits.ids[rows, place]
            vectors = bank[found]
            new = distinct(found, vectors, ids[rows], taken[rows], config.max_similarity)
            at = rows[new], free[rows[new]]
            ids[at], scores[at], taken[at] = found[new], hits.scores[rows[new], place], vectors[new]
            free[rows[new]] += 1
    return Hits(ids[:, 1:], scores[:, 1:])


def draw(candidates: Int64[np.ndarray, "Q C"], count: int, rng: np.random.Generator) -> Int64[np.ndarray, "Q count"]:
    """Of each row `count` different candidates in random order, all if there are fewer.

    Where one is missing stands -1, in front of the others.
    """
    order = np.argsort(np.where(candidates < 0, 2.0, rng.random(candidates.shape)), axis=1)
    drawn = np.take_along_axis(candidates, order, axis=1)[:, :count]
    missing = count - drawn.shape[1]
    return np.pad(drawn, ((0, 0), (0, max(0, missing))), constant_values=-1)[:, ::-1]


def in_turns(candidates: Hits, count: int, config: SelectionConfig) -> list[list[int]]:
    """Of each row of `select` the places of `count` candidates at most: the best by the image, by the text, and so on.

    This is the choice for a request, which is made once, so nothing is drawn. Scores by image and by text are not
    compared: those between a picture and documents with pictures are the higher ones, whatever the documents show.
    """
    by_image, by_text = range(config.by_image), range(config.by_image, config.candidates)
    order = [place for pair in itertools.zip_longest(by_image, by_text) for place in pair if place is not None]
    return [[place for place in order if row[place] >= 0][:count] for row in candidates.ids]


def drop_tokens(ids: Integer[np.ndarray, " L"], share: float, rng: np.random.Generator) -> Integer[np.ndarray, " K"]:
    """The query's tokens without a random `share` of them, each dropped on its own; one is always left."""
    kept = rng.random(len(ids)) >= share
    if len(ids) and not kept.any():
        kept[rng.integers(len(ids))] = True
    return ids[kept]

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


def diverse(
    ids: Int64[np.ndarray, " C"],
    embeddings: Float[np.ndarray, "C D"],
    taken: Float[np.ndarray, "T D"],
    count: int,
    max_similarity: float,
) -> Int64[np.ndarray, " S"]:
    """Places of the first `count` candidates that are no near-duplicates of what was taken, nor of each other.

    Args:
      ids: of the candidates, best first; -1 is passed over, and so is an id that stands twice.
      embeddings, taken: of length 1.
    """
    against = list(taken)
    chosen: list[int] = []
    for place in np.flatnonzero(ids >= 0):
        if len(chosen) == count:
            break
        embedding = embeddings[place]
        if ids[place] not in ids[chosen] and all(embedding @ other <= max_similarity for other in against):
            chosen.append(int(place))
            against.append(embedding)
    return np.array(chosen, np.int64)


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

    Args:
      by_image, by_text: hits of the query's parts.
      queries: the whole query document's embedding, of length 1.
      bank: embeddings [N, D] of all documents, of length 1.
      own: the bank's row of each query, -1 if it has none; it is never among its candidates.

    Returns:
      Hits [Q, by_image + by_text]: those by the image first, then those by the text; -1 where there is none.
    """
    ids = np.full((len(queries), config.candidates), -1, np.int64)
    scores = np.full(ids.shape, -np.inf, np.float32)
    for row in range(len(queries)):
        taken, known = [queries[row]], [int(own[row])]
        for hits, count, column in ((by_image, config.by_image, 0), (by_text, config.by_text, config.by_image)):
            one = Hits(hits.ids[row : row + 1], hits.scores[row : row + 1])
            allowed = (relevant(one, config) & whole(one, complete, config))[0] & ~np.isin(one.ids[0], known)
            candidates = np.where(allowed, one.ids[0], -1)
            embeddings = bank[np.maximum(candidates, 0)]
            places = diverse(candidates, embeddings, np.stack(taken), count, config.max_similarity)
            at = column + len(places)
            ids[row, column:at], scores[row, column:at] = candidates[places], one.scores[0, places]
            taken += list(embeddings[places])
            known += candidates[places].tolist()
    return Hits(ids, scores)


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

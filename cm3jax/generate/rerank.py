"""Choosing among the samples of one task: by the model itself, by CLIP, or by any function of what was made."""

from collections.abc import Callable, Sequence

import numpy as np

from cm3jax.retrieval.encoder import DocumentEncoder
from cm3jax.tokens.document import Document, Image, Text

# Marks of finished documents, higher is better.
Scorer = Callable[[Sequence[Document]], Sequence[float]]


def best_first(scores: Sequence[float]) -> list[int]:
    """Places of the scores from the highest to the lowest; of equal ones the first comes first."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def clip_scorer(encoder: DocumentEncoder) -> Scorer:
    """CLIP's cosine of a document's texts, joined by spaces, and its picture; of several pictures the mean.

    The scorer raises a ValueError for a document without text or without picture.
    """

    def score(documents: Sequence[Document]) -> list[float]:
        pairs, owners = [], []
        for number, document in enumerate(documents):
            said = tuple(segment for segment in document.segments if isinstance(segment, Text))
            shown = [segment for segment in document.segments if isinstance(segment, Image)]
            if not said or not shown:
                raise ValueError(f"clip score: document {number} has {len(said)} texts and {len(shown)} pictures")
            pairs += [Document((*said, picture)) for picture in shown]
            owners += [number] * len(shown)
        images, texts = encoder.parts(pairs)
        cosines = np.sum(images * texts, axis=1, dtype=np.float64)
        return (np.bincount(owners, cosines) / np.bincount(owners)).tolist()

    return score

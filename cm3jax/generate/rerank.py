"""Choosing among the samples of one task: by the model itself, or by any function of what was made."""

from collections.abc import Callable, Sequence

from cm3jax.tokens.document import Document

# Marks of finished documents, higher is better; CLIP's similarity of text and picture is one.
Scorer = Callable[[Sequence[Document]], Sequence[float]]


def best_first(scores: Sequence[float]) -> list[int]:
    """Places of the scores from the highest to the lowest; of equal ones the first comes first."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])

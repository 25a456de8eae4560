"""Choosing the spans that the CM3 objective masks.

Three rules hold whatever is drawn: spans are disjoint and not empty; none contains a boundary (`<break>`, `</s>`,
`<pad>`) or the first token; and there are exactly as many as asked for, if there are that many tokens to mask.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cm3jax.tokens.vocabulary import Vocabulary

Span = tuple[int, int]  # [start, end)


def segments(ids: Integer[np.ndarray, " S"], vocabulary: Vocabulary) -> Int[np.ndarray, "K 2"]:
    """Maximal runs [start, end) between boundaries, from the second token on."""
    maskable: Bool[np.ndarray, " S"] = ~vocabulary.is_boundary(ids)
    maskable[:1] = False
    return np.flatnonzero(np.diff(maskable, prepend=False, append=False)).reshape(-1, 2)


def choose_spans(
    ids: Integer[np.ndarray, " S"],
    count: int,
    whole_segment: float,
    rng: np.random.Generator,
    vocabulary: Vocabulary,
) -> list[Span]:
    """`count` spans of `ids`, in order; fewer only where `ids` has fewer tokens between boundaries.

    With probability `whole_segment` the spans are whole captions or images: 9-token captions beside 1,024-token images
    are next to never hit by spans drawn uniformly, and the model would not learn to caption.
    """
    if count == 0:
        return []
    runs = segments(ids, vocabulary)
    if rng.random() < whole_segment:
        spans = _whole_segments(ids, runs, count, rng, vocabulary)
    else:
        spans = _uniform_spans(len(ids), runs, count, rng)
    while len(spans) < min(count, int(np.sum(runs[:, 1] - runs[:, 0]))):
        _add_span(spans, runs, rng)
    return sorted(spans)


def _whole_segments(
    ids: Integer[np.ndarray, " S"],
    runs: Int[np.ndarray, "K 2"],
    count: int,
    rng: np.random.Generator,
    vocabulary: Vocabulary,
) -> list[Span]:
    """Up to `count` segments of which both ends are in `ids`, all equally likely, so that captions are half of them."""
    complete = runs[(runs[:, 1] < len(ids)) & vocabulary.is_boundary(ids[runs[:, 0] - 1])]
    chosen = rng.choice(len(complete), min(count, len(complete)), replace=False)
    return [(start, end) for start, end in complete[chosen].tolist()]


def _uniform_spans(size: int, runs: Int[np.ndarray, "K 2"], count: int, rng: np.random.Generator) -> list[Span]:
    """Up to `count` disjoint ones out of count^2 uniform spans, each clipped to the segment it overlaps most."""
    if not len(runs):
        return []
    draws: Float[np.ndarray, "C 2"] = np.sort(rng.random((count * count, 2)), axis=1) * size
    starts, ends = np.floor(draws[:, :1]).astype(int), np.rint(draws[:, 1:]).astype(int)
    clipped_starts, clipped_ends = np.maximum(starts, runs[:, 0]), np.minimum(ends, runs[:, 1])
    overlaps: Int[np.ndarray, "C K"] = clipped_ends - clipped_starts
    spans: list[Span] = []
    for candidate, run in enumerate(np.argmax(overlaps, axis=1).tolist()):
        start, end = int(clipped_starts[candidate, run]), int(clipped_ends[candidate, run])
        if start < end and all(end <= a or b <= start for a, b in spans):
            spans.append((start, end))
            if len(spans) == count:
                break
    return spans


def _add_span(spans: list[Span], runs: Int[np.ndarray, "K 2"], rng: np.random.Generator) -> None:
    """One span more: inside the longest stretch still free, or by halving the longest span if all is masked."""
    free_start, free_end = max(_free_stretches(spans, runs), key=lambda s: s[1] - s[0], default=(0, 0))
    if free_start < free_end:
        first, last = np.sort(rng.integers(free_start, free_end, 2)).tolist()
        spans.append((first, last + 1))
        return
    start, end = max(spans, key=lambda s: s[1] - s[0])
    spans.remove((start, end))
    spans += [(start, (start + end) // 2), ((start + end) // 2, end)]


def _free_stretches(spans: list[Span], runs: Int[np.ndarray, "K 2"]) -> list[Span]:
    free = []
    taken = sorted(spans)
    for start, end in runs.tolist():
        for a, b in taken:
            if start <= a and b <= end:
                free.append((start, a))
                start = b
        free.append((start, end))
    return free

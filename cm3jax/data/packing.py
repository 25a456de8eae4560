"""Packing: framed documents into sequences.

Both ways take room for the marks of a sequence's masked spans (3 tokens a span) off its tokens beforehand, so that the
objective never has to cut anything.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64, Integer, Shaped, UInt16

from cm3jax.data.framing import PIECE, FramedDocuments
from cm3jax.data.samples import Samples

MARKS_PER_SPAN = 3  # <sentinel:i> in the hole; <sentinel:i> and <eoss> around the infill


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The sequences of an epoch: i has the pieces `pieces[offsets[i]:offsets[i + 1]]` and room for `spans[i]` spans.

    Attributes:
      pieces: of dtype `PIECE`.
      skipped: documents that are in no sequence, because their sample is longer than one.
    """

    pieces: Shaped[np.ndarray, " P"]
    offsets: Int64[np.ndarray, " N+1"]
    spans: UInt16[np.ndarray, " N"]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.spans)

    def pieces_of(self, i: int) -> Shaped[np.ndarray, " K"]:
        """The pieces of sequence i, in order."""
        return self.pieces[self.offsets[i] : self.offsets[i + 1]]


def pack_cut(documents: FramedDocuments, tokens: int, spans: Integer[np.ndarray, " D"]) -> Plan:
    """Everything in one stream, cut into sequences wherever they end; only the last one may be short.

    Vectorised; peak memory is about 100 bytes a document.

    Args:
      tokens: of a sequence.
      spans: masked spans of sequence 0, 1, ...; more than there will be sequences, the rest is ignored.
    """
    document_starts = np.concatenate([[0], np.cumsum(documents.lengths)])
    total = document_starts[-1]
    sequence_starts = np.concatenate([[0], np.cumsum(tokens - MARKS_PER_SPAN * spans.astype(np.int64))])
    count = int(np.searchsorted(sequence_starts, total))
    if count > len(spans):
        raise ValueError(f"{len(spans)} span counts do not cover {total} tokens in sequences of {tokens}")
    starts = _merge(document_starts[:-1], sequence_starts[:count])
    owners = np.searchsorted(document_starts, starts, side="right") - 1
    pieces = np.empty(len(starts), PIECE)
    pieces["record"] = documents.records[owners]
    pieces["first"] = starts - document_starts[owners]
    pieces["length"] = np.diff(starts, append=total)
    pieces["frame"] = documents.frames[owners]
    offsets = np.append(np.searchsorted(starts, sequence_starts[:count]), len(starts))
    return Plan(pieces, offsets, spans[:count].astype(np.uint16))


def _merge(a: Int64[np.ndarray, " A"], b: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " C"]:
    """Sorted union of two strictly increasing arrays. A stable sort merges two sorted runs in linear time."""
    merged = np.sort(np.concatenate([a, b]), kind="stable")
    return merged[np.diff(merged, prepend=-1) > 0]


def pack_whole(
    samples: Samples,
    documents: FramedDocuments,
    tokens: int,
    spans: Integer[np.ndarray, " D"],
    rng: np.random.Generator,
) -> Plan:
    """Samples stay whole: each goes into the sequence where it leaves the least room, the longest samples first.

    Args:
      tokens: of a sequence; a sample longer than this is left out.
      spans: masked spans wanted in sequence 0, 1, ..., at least one per sample. A sequence that its first sample
        nearly fills gets only as many as fit.
      rng: for the order of the sequences.
    """
    sizes = np.add.reduceat(documents.lengths, samples.offsets[:-1]) if len(samples) else np.empty(0, np.int64)
    kept = np.flatnonzero(sizes <= tokens)
    sequence_of, placed_spans = _best_fit(sizes[kept], tokens, spans)
    order = rng.permutation(len(placed_spans))
    sequence_of = order[sequence_of]
    # Within a sequence samples keep the shuffled order of the epoch: the sort is stable.
    in_order = np.argsort(sequence_of, kind="stable")
    rows = kept[in_order]
    counts = np.diff(samples.offsets)[rows]
    chosen = np.repeat(samples.offsets[rows] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    pieces = np.empty(len(chosen), PIECE)
    pieces["record"] = documents.records[chosen]
    pieces["first"] = 0
    pieces["length"] = documents.lengths[chosen]
    pieces["frame"] = documents.frames[chosen]
    sequence_of_piece = np.repeat(sequence_of[in_order], counts)
    offsets = np.searchsorted(sequence_of_piece, np.arange(len(order) + 1))
    shuffled_spans = np.empty(len(order), np.uint16)
    shuffled_spans[order] = placed_spans
    return Plan(pieces, offsets, shuffled_spans, skipped=len(documents.records) - len(chosen))


def _best_fit(
    sizes: Int64[np.ndarray, " S"], tokens: int, spans: Integer[np.ndarray, " D"]
) -> tuple[Int64[np.ndarray, " S"], list[int]]:
    """Sequence of each sample, and the masked spans of each sequence (best fit, decreasing)."""
    sequence_of = np.empty(len(sizes), np.int64)
    placed_spans: list[int] = []
    with_room: list[list[int]] = [[] for _ in range(tokens + 1)]  # sequences by tokens still free
    rooms = 0  # bit r: some sequence has r tokens free; finds the best fit in one shift
    for sample in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[sample])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            sequence = len(placed_spans)
            placed_spans.append(min(int(spans[sequence]), (tokens - size) // MARKS_PER_SPAN))
            room = tokens - MARKS_PER_SPAN * placed_spans[-1]
        room -= size
        with_room[room].append(sequence)
        rooms |= 1 << room
        sequence_of[sample] = sequence
    return sequence_of, placed_spans

"""Frames: the marks around the documents of a sample, and pieces of framed documents.

    </s> document <break> document ... <break> query </s>

Each document brings the mark in front of it, the last one also the `</s>` behind it. A piece counts positions of the
framed document (position 0 is the mark in front), so marks need no rows of their own in a plan.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, Shaped, UInt8

from cm3jax.data.samples import Samples
from cm3jax.tokens.vocabulary import Vocabulary

# Bits that say where a document stands in its sample.
OPENS = 1  # first: `</s>` in front, not `<break>`
CLOSES = 2  # last: `</s>` behind

# Framed tokens [first, first + length) of a record.
PIECE = np.dtype([("record", np.int64), ("first", np.int32), ("length", np.int32), ("frame", np.uint8)])


@dataclasses.dataclass(frozen=True, eq=False)
class FramedDocuments:
    """All documents of an epoch in order.

    Attributes:
      records: record ids.
      lengths: tokens with the frame.
      frames: `OPENS` and `CLOSES`.
    """

    records: Int64[np.ndarray, " M"]
    lengths: Int64[np.ndarray, " M"]
    frames: UInt8[np.ndarray, " M"]


def frame_samples(samples: Samples, lengths: Integer[np.ndarray, " R"]) -> FramedDocuments:
    """Frames every document of `samples`; `lengths` are the tokens of all records, without frames."""
    frames = np.zeros(len(samples.records), np.uint8)
    frames[samples.offsets[:-1]] |= OPENS
    frames[samples.offsets[1:] - 1] |= CLOSES
    framed = lengths[samples.records] + 1 + (frames & CLOSES != 0)
    return FramedDocuments(samples.records, framed.astype(np.int64), frames)


def framed_ids(ids: Integer[np.ndarray, " N"], frame: int, vocabulary: Vocabulary) -> Int32[np.ndarray, " F"]:
    """The document's ids within its frame, F = N + 1 or N + 2."""
    closes = frame & CLOSES != 0
    framed = np.empty(len(ids) + 1 + closes, np.int32)
    framed[0] = vocabulary.eos if frame & OPENS else vocabulary.break_id
    framed[1 : len(ids) + 1] = ids
    if closes:
        framed[-1] = vocabulary.eos
    return framed


def query_tokens(pieces: Shaped[np.ndarray, " K"]) -> Bool[np.ndarray, " S"]:
    """Which tokens of `pieces` (dtype `PIECE`), one after the other, are of a query: the last document of its sample.

    The `</s>` behind the query counts, the mark in front does not: then the tokens are the same ones whether retrieved
    documents stand in front or not.
    """
    parts = [
        (np.arange(first, first + length) > 0) & bool(frame & CLOSES) for _, first, length, frame in pieces.tolist()
    ]
    return np.concatenate([np.zeros(0, bool), *parts])

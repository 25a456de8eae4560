"""Documents: ordered segments of text and images, and the ids that stand for them."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8

from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image: pixels, its codes in raster order, or both."""

    pixels: UInt8[np.ndarray, "H W 3"] | None = None
    codes: Int[np.ndarray, " N"] | None = None

    def __post_init__(self):
        if self.pixels is None and self.codes is None:
            raise ValueError("an Image needs pixels or codes")


Segment = Text | Image


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Ordered segments. `meta` is carried along (truth for evaluation), never tokenised."""

    segments: tuple[Segment, ...]
    id: str = ""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


TEXT, IMAGE = 0, 1  # kinds of a segment in `TokenizedDocument.segments`


class DocumentError(ValueError):
    """A document that has no ids, or ids that are no document."""


def texts(document: Document) -> list[str]:
    """Its texts, in order."""
    return [segment.text for segment in document.segments if isinstance(segment, Text)]


def pictures(document: Document) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The pixels of its images, in order; images that are known by their codes alone are left out."""
    return [s.pixels for s in document.segments if isinstance(s, Image) and s.pixels is not None]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as ids: its segments with `<break>` between them.

    Attributes:
      ids: ids of the unified vocabulary.
      segments: rows (start, length, kind) of `ids`, kind TEXT or IMAGE; the `<break>`s lie between them.
    """

    ids: Int32[np.ndarray, " N"]
    segments: Int32[np.ndarray, "S 3"]


def encode_document(document: Document, tokenizer: TextTokenizer, vocabulary: Vocabulary) -> TokenizedDocument:
    """Ids of a document whose images carry codes.

    Raises:
      DocumentError: no segment, an image without codes or with codes outside the vocabulary, text with a lone
        surrogate.
      ValueError: the tokenizer has more ids than the vocabulary has room for text.
    """
    if tokenizer.size > vocabulary.text_size:
        raise ValueError(f"text tokenizer has {tokenizer.size} ids, the vocabulary {vocabulary.text_size} for text")
    if not document.segments:
        raise DocumentError(f"document {document.id!r} has no segment")
    parts: list[np.ndarray] = []
    spans = []
    start = 0
    for number, segment in enumerate(document.segments):
        if number:
            parts.append(np.array([vocabulary.break_id], np.int32))
            start += 1
        try:
            ids, kind = _segment_ids(segment, tokenizer, vocabulary)
        except ValueError as error:
            raise DocumentError(f"document {document.id!r}, segment {number}: {error}") from error
        parts.append(ids)
        spans.append((start, len(ids), kind))
        start += len(ids)
    return TokenizedDocument(np.concatenate(parts), np.array(spans, np.int32))


def _segment_ids(
    segment: Segment, tokenizer: TextTokenizer, vocabulary: Vocabulary
) -> tuple[Int32[np.ndarray, " N"], int]:
    if isinstance(segment, Text):
        return np.array(tokenizer.encode(segment.text), np.int32), TEXT
    if segment.codes is None:
        raise ValueError("the image has pixels but no codes")
    codes = np.asarray(segment.codes)
    if codes.ndim != 1 or not codes.size or codes.dtype.kind not in "iu":
        raise ValueError(f"image codes {codes.dtype}{list(codes.shape)}, expected integers [N], N >= 1")
    if codes.min() < 0 or codes.max() >= vocabulary.image_size:
        raise ValueError(f"image codes {codes.min()}..{codes.max()}, expected 0 <= code < {vocabulary.image_size}")
    return vocabulary.image_id(codes.astype(np.int32)), IMAGE


def decode_document(
    ids: Int[np.ndarray, " N"], tokenizer: TextTokenizer, vocabulary: Vocabulary, image_tokens: int
) -> Document:
    """The segments of `ids`; exact inverse of `encode_document` for images of `image_tokens` codes.

    Raises:
      DocumentError: an id that is neither text, image nor `<break>`, an image cut short or too long, text and image
        not separated by `<break>`; the message says where.
    """
    ids = np.asarray(ids).astype(np.int64)
    breaks = np.flatnonzero(ids == vocabulary.break_id)
    starts = [0, *(breaks + 1)]
    ends = [*breaks, len(ids)]
    return Document(
        tuple(
            _segment(ids[start:end], int(start), tokenizer, vocabulary, image_tokens)
            for start, end in zip(starts, ends, strict=True)
        )
    )


def _segment(
    ids: Int[np.ndarray, " N"], start: int, tokenizer: TextTokenizer, vocabulary: Vocabulary, image_tokens: int
) -> Segment:
    is_image, is_text = vocabulary.is_image(ids), vocabulary.is_text(ids) & (ids < tokenizer.size)
    if not np.all(is_image | is_text):
        position = int(np.argmin(is_image | is_text))
        name = vocabulary.name(int(ids[position]))
        raise DocumentError(f"{name} at position {start + position} is not part of a document")
    if not is_image.any():
        return Text(tokenizer.decode(ids.tolist()))
    if not is_image.all():
        position = int(np.argmax(is_image != is_image[0]))
        raise DocumentError(f"text and image meet at position {start + position} without <break>")
    if len(ids) != image_tokens:
        raise DocumentError(f"image at position {start} has {len(ids)} tokens, expected {image_tokens}")
    return Image(codes=vocabulary.image_code(ids).astype(np.int32))

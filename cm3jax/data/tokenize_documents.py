"""Documents of a source as records: reading and checking in threads, pictures encoded in batches."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, UInt8

from cm3jax.data.records import Record
from cm3jax.data.rejects import Reject
from cm3jax.data.sources.source import Reason, RejectError, Source
from cm3jax.tokens.document import IMAGE, DocumentError, Image, Segment, TokenizedDocument, encode_document
from cm3jax.tokens.image import fit
from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary

EncodeImages = Callable[[UInt8[np.ndarray, "B H W 3"]], Int[np.ndarray, "B N"]]


class TokenizeError(ValueError):
    """A job that cannot run; the message says what was found and what was expected."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides on the bytes of the records, beside the image tokenizer's arithmetic."""

    source_name: str
    source: str
    documents: int
    split: str
    vocabulary: Vocabulary
    text_tokenizer: str
    image_tokenizer: str
    image_size: int
    image_tokens: int
    shard_documents: int

    @property
    def shards(self) -> int:
        return -(-self.documents // self.shard_documents)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedDocument:
    """A document with room for the codes of its pictures: `spans` of `tokenized.ids`, one for each of `pixels`."""

    index: int
    id: str
    tokenized: TokenizedDocument
    spans: list[slice]
    pixels: list[UInt8[np.ndarray, "size size 3"]]


class DocumentTokenizer:
    """Turns documents of `source` into records, in two steps between which a caller may drop some."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        tokenizer: TextTokenizer,
        encode_images: EncodeImages,
        batch_size: int,
    ):
        self._source, self._settings, self._tokenizer = source, settings, tokenizer
        self._encode_images, self._batch_size = encode_images, batch_size

    def load(self, index: int) -> LoadedDocument | Reject:
        """Document `index`, checked and fitted; runs in threads."""
        settings = self._settings
        try:
            document = self._source[index]
        except RejectError as error:
            return Reject(index, error.key, error.reason, error.detail)
        key = document.id or str(index)
        room = Image(codes=np.zeros(settings.image_tokens, np.int32))
        segments: list[Segment] = []
        numbers, pixels = [], []
        for number, segment in enumerate(document.segments):
            if isinstance(segment, Image) and segment.codes is None and segment.pixels is not None:
                numbers.append(number)
                pixels.append(fit(segment.pixels, settings.image_size))
                segment = room
            segments.append(segment)
        document = dataclasses.replace(document, segments=tuple(segments))
        try:
            tokenized = encode_document(document, self._tokenizer, settings.vocabulary)
        except DocumentError as error:
            return Reject(index, key, Reason.MALFORMED, str(error))
        starts, lengths, kinds = tokenized.segments.T
        if np.any(lengths[kinds == IMAGE] != settings.image_tokens):
            detail = f"images of {lengths[kinds == IMAGE].tolist()} codes, expected {settings.image_tokens} each"
            return Reject(index, key, Reason.MALFORMED, detail)
        spans = [slice(start, start + settings.image_tokens) for start in starts[numbers].tolist()]
        return LoadedDocument(index, key, tokenized, spans, pixels)

    def records(self, documents: Iterator[LoadedDocument]) -> Iterator[Record]:
        """Records, their pictures encoded `batch_size` at a time."""
        waiting: list[LoadedDocument] = []
        for document in documents:
            waiting.append(document)
            if sum(len(w.pixels) for w in waiting) >= self._batch_size or len(waiting) >= 8 * self._batch_size:
                yield from self._encode(waiting)
                waiting = []
        yield from self._encode(waiting)

    def _encode(self, documents: list[LoadedDocument]) -> Iterator[Record]:
        pictures = [picture for document in documents for picture in document.pixels]
        batches = [pictures[i : i + self._batch_size] for i in range(0, len(pictures), self._batch_size)]
        codes = iter([row for batch in batches for row in self._codes(np.stack(batch))])
        for document in documents:
            ids = document.tokenized.ids.copy()
            for span in document.spans:
                ids[span] = self._settings.vocabulary.image_id(next(codes))
            yield Record(
                ids=ids.astype(self._settings.vocabulary.dtype),
                segments=document.tokenized.segments,
                id=document.id,
                index=document.index,
            )

    def _codes(self, pictures: UInt8[np.ndarray, "B H W 3"]) -> Int[np.ndarray, "B N"]:
        codes = np.asarray(self._encode_images(pictures))
        wanted, top = (len(pictures), self._settings.image_tokens), self._settings.vocabulary.image_size
        if codes.shape != wanted or codes.dtype.kind not in "iu":
            raise TokenizeError(f"encode_images gave {codes.dtype}{codes.shape}, expected integers {wanted}")
        if codes.min() < 0 or codes.max() >= top:
            raise TokenizeError(f"encode_images gave codes {codes.min()}..{codes.max()}, expected 0 <= code < {top}")
        return codes.astype(np.int32)

"""One document of a source: read, checked, its pictures resized and encoded, and what finds it again as a duplicate."""

import dataclasses
import hashlib
import io

import numpy as np
import PIL.Image
from jaxtyping import Int, Int8, UInt8, UInt64

from cm3jax.data.ingest.hash import BANDS, DETAILS, image_hash
from cm3jax.data.ingest.rules import check_document
from cm3jax.data.ingest.settings import IngestConfig
from cm3jax.data.rejects import Reject
from cm3jax.data.sources.source import Reason, RejectError, Source
from cm3jax.tokens.document import Document, Image, Text, pictures
from cm3jax.tokens.image import encode_png


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What decides whether a document is the duplicate of another.

    Attributes:
      index: the document's index in the source.
      id, document, images: 128-bit digests of its id, of all segments, and of the decoded pictures (empty for none).
      bits, detail: perceptual hashes of its P pictures, in order.
      probes: where its first picture asks for others (`ImageHash.probes`); None once the document has been judged.
    """

    index: int
    id: bytes
    document: bytes
    images: bytes
    bits: UInt64[np.ndarray, "P 2"]
    detail: Int8[np.ndarray, "P details"]
    probes: Int[np.ndarray, "bands probes"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A document that obeys all rules: its segments as text, or as the bytes of a picture file."""

    key: str
    segments: tuple[str | bytes, ...]
    signature: Signature

    @property
    def index(self) -> int:
        return self.signature.index


def prepare(source: Source, index: int, config: IngestConfig) -> Prepared | Reject:
    """Document `index` of `source`, or why it is refused."""
    key = ""
    try:
        document = source[index]
        document = dataclasses.replace(document, id=document.id or str(index))
        key = document.id
        check_document(document, config)
        segments: list[str | bytes] = []
        small: list[UInt8[np.ndarray, "h w 3"]] = []
        for segment in document.segments:
            if isinstance(segment, Text):
                segments.append(segment.text)
                continue
            if segment.pixels is None:
                raise RejectError(Reason.NO_IMAGE, "a picture that is known by its codes alone", key)
            small.append(shrink(segment.pixels, config.max_short_side))
            segments.append(encode_picture(small[-1], config))
    except RejectError as error:
        return Reject(index, error.key or key, error.reason, error.detail)
    return Prepared(key, tuple(segments), _signature(index, document, small))


def shrink(pixels: UInt8[np.ndarray, "H W 3"], short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with its short side at most `short_side`, by Lanczos; the long side keeps its proportion."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= short_side:
        return pixels
    size = (round(width * short_side / short), round(height * short_side / short))
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.LANCZOS))


def encode_picture(pixels: UInt8[np.ndarray, "H W 3"], config: IngestConfig) -> bytes:
    """The bytes of a file in the configured format."""
    if config.picture_format == "png":
        return encode_png(pixels)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=config.jpeg_quality)
    return buffer.getvalue()


def _signature(index: int, document: Document, small: list[UInt8[np.ndarray, "h w 3"]]) -> Signature:
    hashes = [image_hash(pixels) for pixels in small]
    originals = [_digest(b"%d x %d" % pixels.shape[:2], pixels.tobytes()) for pixels in pictures(document)]
    left = iter(originals)
    parts = [next(left) if isinstance(s, Image) else _digest(b"text", s.text.encode()) for s in document.segments]
    return Signature(
        index=index,
        id=_digest(document.id.encode()),
        document=_digest(*parts),
        images=_digest(*originals) if originals else b"",
        bits=np.array([h.bits for h in hashes], np.uint64).reshape(-1, 2),
        detail=np.array([h.detail for h in hashes], np.int8).reshape(-1, DETAILS),
        probes=hashes[0].probes if hashes else np.zeros((BANDS, 0), np.int64),
    )


def signature_of_bytes(index: int, id: bytes, document: bytes, images: bytes, bits: bytes, detail: bytes) -> Signature:
    """A signature without probes, from its arrays' bytes."""
    return Signature(
        index=index,
        id=id,
        document=document,
        images=images,
        bits=np.frombuffer(bits, np.uint64).reshape(-1, 2),
        detail=np.frombuffer(detail, np.int8).reshape(-1, DETAILS),
        probes=None,
    )


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(b"%d\0" % len(part))
        digest.update(part)
    return digest.digest()

"""What decides on the documents that an ingest keeps, and on their bytes."""

import dataclasses
from typing import Any, Literal

from cm3jax import config

FORMAT = 2  # goes up when the same source and settings give other documents


class IngestError(ValueError):
    """A job that cannot run; the message says what was found and what was expected."""


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """Filters and output.

    Attributes:
      max_short_side: larger pictures are resized, short side to this, pixels.
      min_short_side: pictures with a shorter side are refused, pixels.
      max_aspect: longer over shorter side, at most.
      min_characters, max_characters: bounds on all texts of a document together, white space not counted.
      min_letter_share: letters (of any script, with their marks) among the characters that are no white space.
      max_character_run: one character repeated in a row, at most.
      max_word_share: share of the most frequent word in texts of eight words and more, at most.
      duplicates: what is removed. "none"; "documents" with the same texts and pictures as an earlier one; "images",
        also those with the same pictures and other texts; "near", also those with nearly the same pictures.
      near_distance: bits of 128 that the hashes of nearly the same pictures differ in, at most.
      picture_format: of the pictures that are written; "png" is lossless.
      jpeg_quality: 1 to 100.
      shard_documents: documents of the source that one shard stands for, refused ones included.

    Raises:
      ValueError: a bound that no document could meet, or a value outside its range.
    """

    max_short_side: int = 512
    min_short_side: int = 64
    max_aspect: float = 4.0
    min_characters: int = 3
    max_characters: int = 10_000
    min_letter_share: float = 0.5
    max_character_run: int = 10
    max_word_share: float = 0.5
    duplicates: Literal["none", "documents", "images", "near"] = "near"
    near_distance: int = 28
    picture_format: Literal["jpeg", "png"] = "jpeg"
    jpeg_quality: int = 95
    shard_documents: int = 2_048

    def __post_init__(self):
        at_least_one = ("max_short_side", "min_short_side", "max_aspect", "max_character_run", "shard_documents")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}, expected >= 1")
        for name in ("min_letter_share", "max_word_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}, expected 0 <= share <= 1")
        if not 0 <= self.min_characters <= self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters}, max_characters {self.max_characters}: no text fits"
            )
        if not 0 <= self.near_distance < 64:
            raise ValueError(f"near_distance {self.near_distance}, expected 0 <= bits < 64: unrelated pictures have 64")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality {self.jpeg_quality}, expected 1 <= quality <= 100")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides on the bytes of a directory, beside the versions of the picture codecs.

    Attributes:
      spec, split: what `open_source` opens.
      source: fingerprint of what was opened.
      documents: how many it has.
    """

    spec: str
    split: str | None
    source_name: str
    source: str
    documents: int
    config: IngestConfig

    @property
    def shards(self) -> int:
        return -(-self.documents // self.config.shard_documents)

    def indices(self, shard: int) -> range:
        """Documents of the source that `shard` stands for."""
        begin = shard * self.config.shard_documents
        return range(begin, min(begin + self.config.shard_documents, self.documents))

    def flat(self) -> dict[str, Any]:
        """As JSON values. Where the source lies does not count: the fingerprint of what lies there does."""
        source = {"source_name": self.source_name, "source": self.source, "documents": self.documents}
        return {"job": "ingest", "format": FORMAT, **source, **config.to_dict(self.config)}

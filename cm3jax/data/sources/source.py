"""What every source of documents offers, and how it refuses a broken one."""

import enum
import itertools
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from cm3jax.tokens.document import Document


class Reason(enum.StrEnum):
    """Why a document is refused."""

    MISSING_FILE = "missing_file"
    UNSAFE_PATH = "unsafe_path"
    FILE_TOO_LARGE = "file_too_large"
    BROKEN_IMAGE = "broken_image"
    IMAGE_TOO_LARGE = "image_too_large"
    NO_CAPTION = "no_caption"
    NO_IMAGE = "no_image"
    BAD_ENCODING = "bad_encoding"
    MALFORMED = "malformed"
    DUPLICATE_ID = "duplicate_id"
    DUPLICATE_DOCUMENT = "duplicate_document"
    DUPLICATE_IMAGE = "duplicate_image"
    NEAR_DUPLICATE_IMAGE = "near_duplicate_image"
    IMAGE_TOO_SMALL = "image_too_small"
    EXTREME_ASPECT = "extreme_aspect"
    TEXT_TOO_SHORT = "text_too_short"
    TEXT_TOO_LONG = "text_too_long"
    CONTROL_CHARACTERS = "control_characters"
    ONLY_URLS = "only_urls"
    FEW_LETTERS = "few_letters"
    REPEATED_TEXT = "repeated_text"


class RejectError(ValueError):
    """One document cannot be used; the job goes on without it.

    Attributes:
      reason: a member of `Reason`.
      detail: the file, what was found and what was expected.
      key: the document's id where it is known, else "".
    """

    def __init__(self, reason: Reason, detail: str, key: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.key = Reason(reason), detail, key

    def __reduce__(self):
        return RejectError, (self.reason, self.detail, self.key)


class Source(Protocol):
    """Documents by index, so that a job resumes from one integer. Nothing is read before it is asked for."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document:
        """Document `index`, the same at every call.

        Raises:
          RejectError: this document is broken.
          IndexError: no such index.
        """

    def fingerprint(self) -> str:
        """Changes when the listing (names, sizes) or an option changes; cheap, so contents are not hashed."""


@runtime_checkable
class GroupedSource(Source, Protocol):
    """A source where several documents share an image; a train/valid split keeps them together."""

    groups: Int64[np.ndarray, " N"]


def check_index(index: int, length: int) -> None:
    """Raises IndexError unless 0 <= index < length (what ends a plain `for document in source`)."""
    if not 0 <= index < length:
        raise IndexError(f"document {index} of {length}")


def usable(source: Source, count: int | None = None) -> Iterator[Document]:
    """The first `count` documents (all if None) that are not broken, in order."""

    def good() -> Iterator[Document]:
        for index in range(len(source)):
            try:
                yield source[index]
            except RejectError:
                continue

    return itertools.islice(good(), count)

"""Captions as rows of a fixed length: what text encoders read, with CLIP's ids or those of the project's own model."""

import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from cm3jax.tokens.clip_bpe import ClipTokenizer
from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary


class Encoder(Protocol):
    """Text to ids."""

    size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...


class CaptionTokenizer:
    """Rows `start, text, end, pad ...`; what does not fit between start and end is cut off.

    Attributes:
      size: of the id space.
      end: the id whose place holds a text's feature.
      fingerprint: changes when any row would.
    """

    def __init__(self, encoder: Encoder, context: int, start: int, end: int, pad: int):
        self._encoder, self.context = encoder, context
        self.size, self.start, self.end, self.pad = encoder.size, start, end, pad
        self.fingerprint = f"{encoder.fingerprint}-{context}"

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "B context"]:
        """One row for each text."""
        return np.stack([self.row(self.ids(text)) for text in texts])

    def row(self, ids: list[int]) -> Int32[np.ndarray, " context"]:
        """The row of the ids of a text."""
        row = np.full(self.context, self.pad, np.int32)
        row[: len(ids) + 2] = [self.start, *ids[: self.context - 2], self.end]
        return row

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone; one that spells `end` would end the text there."""
        return [i for i in self._encoder.encode(text) if i not in (self.start, self.end)]


def load_caption_tokenizer(path: str | pathlib.Path, context: int) -> CaptionTokenizer:
    """CLIP's tokenizer from its merges (`.txt`, `.txt.gz`), or the project's from a sentencepiece model (`.model`).

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of another kind, or one that cannot be read.
    """
    name = pathlib.Path(path).name
    if name.endswith((".txt", ".txt.gz")):
        clip = ClipTokenizer.load(path)
        return CaptionTokenizer(clip, context, clip.start, clip.end, clip.pad)
    if name.endswith(".model"):
        controls = Vocabulary()  # the control ids of every vocabulary
        return CaptionTokenizer(TextTokenizer.load(path), context, controls.bos, controls.eos, controls.pad)
    raise ValueError(f"caption tokenizer {path}: expected CLIP merges (.txt, .txt.gz) or a sentencepiece .model")

"""Pairs of a picture and a caption, for the models that compare the two."""

import functools
import itertools
import logging

import numpy as np
from jaxtyping import Int64

from cm3jax import config
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.sources.source import Reason, RejectError, Source
from cm3jax.tokens.captions import CaptionTokenizer
from cm3jax.tokens.document import pictures, texts
from cm3jax.tokens.image import fit

logger = logging.getLogger(__name__)


class PairExamples:
    """Example j of an endless stream, shuffled anew each epoch: the first text and picture of a document.

    Documents are opened once and kept, fitted; a source that does not fit in memory gives `keep=False`.

    Attributes:
      fingerprint: changes when any example would.
    """

    def __init__(self, source: Source, tokenizer: CaptionTokenizer, image_size: int, seed: int, keep: bool = True):
        """Examples of `source`.

        Raises:
          ValueError: the source is empty.
        """
        if not len(source):
            raise ValueError(f"no documents in source {source.name}")
        self.source, self.tokenizer, self.image_size, self.seed, self.keep = source, tokenizer, image_size, seed, keep
        self.fingerprint = config.fingerprint([source.fingerprint(), tokenizer.fingerprint, image_size, seed])
        self._opened: dict[int, dict[str, np.ndarray]] = {}
        # Two, because reading ahead over the end of an epoch goes back and forth between them.
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __reduce__(self):
        return PairExamples, (self.source, self.tokenizer, self.image_size, self.seed, self.keep)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`image`: uint8 [S, S, 3]; `text`: int32 [context].

        A document that is no pair gives its place to the next one.

        Raises:
          IndexError: a negative index.
          RejectError: no document of the source is a pair.
        """
        if index < 0:
            raise IndexError(f"example {index}, expected >= 0")
        epoch, i = divmod(index, len(self.source))
        first, count = int(self._permutation(epoch)[i]), len(self.source)
        for document in itertools.chain(range(first, count), range(first)):
            try:
                return self.document(document)
            except RejectError as error:
                logger.warning("document %d of %s is replaced by the next: %s", document, self.source.name, error)
        raise RejectError(Reason.NO_CAPTION, f"none of {count} documents of {self.source.name} is a pair")

    def document(self, index: int) -> dict[str, np.ndarray]:
        """Document `index` of the source as an example.

        Raises:
          RejectError: a document without text or without picture.
        """
        if index in self._opened:
            return self._opened[index]
        document = self.source[index]
        words, seen = texts(document), pictures(document)
        if not words or not seen:
            reason = Reason.NO_IMAGE if words else Reason.NO_CAPTION
            raise RejectError(
                reason, f"document {index} of {self.source.name}: expected a text and a picture", document.id
            )
        example = {"image": fit(seen[0], self.image_size), "text": self.tokenizer(words[:1])[0]}
        if self.keep:
            self._opened[index] = example
        return example

    def _make_permutation(self, epoch: int) -> Int64[np.ndarray, " N"]:
        return generator(Purpose.IMAGE_ORDER, self.seed, epoch).permutation(len(self.source))

"""Pictures by random access, for the models that learn from pixels."""

import dataclasses
import functools
import logging
import threading
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Int64, UInt8

from cm3jax import config
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.sources.source import Reason, RejectError, Source
from cm3jax.tokens.document import Image
from cm3jax.tokens.image import fit

logger = logging.getLogger(__name__)

Pixels = UInt8[np.ndarray, "H W 3"]

# Longer pictures are cut to this before resizing, so that a picture of extreme shape does not become a huge one.
MAX_ASPECT = 4


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes an example.

    Attributes:
      size: side of the square, pixels. The short side is resized to it.
      crop: where on the long side the square is cut.
      flip: mirror half of the examples.
      cache_bytes: memory for resized pictures, in each process; 0 for none.
    """

    size: int
    crop: Literal["center", "random"] = "random"
    flip: bool = True
    cache_bytes: int = 1 << 30

    def __post_init__(self):
        if self.size < 1 or self.cache_bytes < 0:
            raise ValueError(f"expected size >= 1 and cache_bytes >= 0, found {self}")


class ImageExamples:
    """Example j of an endless stream, shuffled anew each epoch: a pure function of (source, config, seed, j).

    A document without a usable picture is replaced by the next one that has one. Threads may share it, processes may
    pickle it.

    Attributes:
      fingerprint: changes when any example would.
    """

    def __init__(self, source: Source, config_: ImageConfig, seed: int):
        """Examples from the first picture of each document.

        Raises:
          ValueError: the source is empty.
        """
        if not len(source):
            raise ValueError(f"no documents in source {source.name}")
        self.source, self.config, self.seed = source, config_, seed
        decoded = {k: v for k, v in config.to_dict(config_).items() if k != "cache_bytes"}
        self.fingerprint = config.fingerprint([source.fingerprint(), decoded, seed])
        self._lock = threading.Lock()
        self._cache: dict[int, Pixels] = {}
        self._cached_bytes = 0
        self._rejected: set[int] = set()
        # Two, because reading ahead over the end of an epoch goes back and forth between them.
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __reduce__(self):
        return ImageExamples, (self.source, self.config, self.seed)

    @property
    def rejected(self) -> int:
        """Documents found unusable so far, in this process."""
        return len(self._rejected)

    def __getitem__(self, index: int) -> dict[str, UInt8[np.ndarray, "size size 3"]]:
        """`image`: uint8 [size, size, 3].

        Raises:
          IndexError: a negative index.
          RejectError: no document of the source has a usable picture.
        """
        if index < 0:
            raise IndexError(f"example {index}, expected >= 0")
        epoch, i = divmod(index, len(self.source))
        pixels = self._usable(int(self._permutation(epoch)[i]))
        rng = generator(Purpose.IMAGE_CROP, self.seed, index)
        size = self.config.size
        top, left = (int(rng.integers(side - size + 1)) for side in pixels.shape[:2])
        square = pixels[top : top + size, left : left + size]
        if self.config.flip and rng.random() < 0.5:
            square = square[:, ::-1]
        return {"image": np.ascontiguousarray(square)}

    def _make_permutation(self, epoch: int) -> Int64[np.ndarray, " N"]:
        return generator(Purpose.IMAGE_ORDER, self.seed, epoch).permutation(len(self.source))

    def _usable(self, document: int) -> Pixels:
        """The resized picture of `document` or of the next usable one, around the end."""
        for step in range(len(self.source)):
            candidate = (document + step) % len(self.source)
            if candidate in self._rejected:
                continue
            try:
                return self._resized(candidate)
            except RejectError as error:
                self._rejected.add(candidate)
                logger.warning("document %d of %s is replaced by the next: %s", candidate, self.source.name, error)
        raise RejectError(Reason.NO_IMAGE, f"none of {len(self.source)} documents of {self.source.name} has a picture")

    def _resized(self, document: int) -> Pixels:
        cached = self._cache.get(document)
        if cached is not None:
            return cached
        pixels = _first_picture(self.source, document)
        size = self.config.size
        pixels = fit(pixels, size) if self.config.crop == "center" else _resize_short_side(pixels, size)
        with self._lock:
            if document not in self._cache and self._cached_bytes + pixels.nbytes <= self.config.cache_bytes:
                self._cache[document] = pixels
                self._cached_bytes += pixels.nbytes
        return pixels


def _first_picture(source: Source, index: int) -> Pixels:
    document = source[index]
    for segment in document.segments:
        if isinstance(segment, Image) and segment.pixels is not None:
            return segment.pixels
    raise RejectError(Reason.NO_IMAGE, f"document {index} of {source.name} has no pixels", document.id)


def _resize_short_side(pixels: Pixels, size: int) -> Pixels:
    """Short side to `size`, with Lanczos; the long side keeps its proportion, up to `MAX_ASPECT`."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    kept_height, kept_width = min(height, MAX_ASPECT * short), min(width, MAX_ASPECT * short)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    resized = PIL.Image.fromarray(pixels).resize(
        (round(kept_width * size / short), round(kept_height * size / short)),
        PIL.Image.Resampling.LANCZOS,
        box=(left, top, left + kept_width, top + kept_height),
    )
    return np.asarray(resized)

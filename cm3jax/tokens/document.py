"""Documents: ordered segments of text and images."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8


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

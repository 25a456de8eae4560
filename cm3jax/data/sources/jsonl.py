"""JSON lines: one document a line, pictures named by paths beside the file."""

import pathlib

import numpy as np
from jaxtyping import UInt8

from cm3jax.data.sources.reading import (
    caption_in,
    checked_text,
    inside,
    json_of,
    listing_fingerprint,
    pixels_of,
    read_file,
    read_range,
    segments_in,
)
from cm3jax.data.sources.source import check_index
from cm3jax.tokens.document import Document
from cm3jax.tokens.image import MAX_PIXELS

_CHUNK = 1 << 24
_LONGEST_BLANK = 8  # bytes; a longer line of spaces is a document without JSON


class JsonlSource:
    """Lines of one of two forms, each with an optional "id" (else the line's number):

        {"caption": "...", "image": "photos/1.jpg"}           "text" for "caption" does, too; "image" may be missing
        {"segments": [{"text": "..."}, {"image": "photos/1.jpg"}, ...]}

    Pictures must lie in the file's folder or below. Captions lose their outer white space, segments nothing. The lines'
    places are found once, when the source is made; blank lines do not count.
    """

    name = "jsonl"

    def __init__(self, path: str | pathlib.Path, max_pixels: int = MAX_PIXELS):
        """Finds the lines.

        Raises:
          FileNotFoundError: no such file.
        """
        self._path = pathlib.Path(path)
        self._max_pixels = max_pixels
        if not self._path.is_file():
            raise FileNotFoundError(f"no file {self._path}")
        starts = _line_starts(self._path)
        self._starts, self._sizes = starts[:-1], np.diff(starts)
        blank = [
            line for line in np.flatnonzero(self._sizes <= _LONGEST_BLANK).tolist() if not self._line(line).strip()
        ]
        self._numbers = np.delete(np.arange(len(self._sizes)), blank)

    def _line(self, line: int) -> bytes:
        start, size = int(self._starts[line]), int(self._sizes[line])
        return read_range(self._path, start, size, f"{self._path}:{line + 1}", str(line + 1))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        line = int(self._numbers[index])
        what, key = f"{self._path}:{line + 1}", str(line + 1)
        values = json_of(self._line(line), what, key)
        key = checked_text(str(values.get("id", key)), what, key)
        if values.get("segments") is None:
            segments = [{"text": caption_in(values, what, key)}]
            segments += [{"image": values["image"]}] if values.get("image") is not None else []
            values = {"segments": segments}

        def picture(relative: str) -> UInt8[np.ndarray, "H W 3"]:
            path = inside(self._path.parent, relative, key)
            return pixels_of(read_file(path, key), f"{what}: {path}", key, self._max_pixels)

        return Document(segments_in(values, picture, what, key), id=key)

    def fingerprint(self) -> str:
        listing = [(self._path.name, self._path.stat().st_size)]
        return listing_fingerprint(self.name, listing, max_pixels=self._max_pixels)


def _line_starts(path: pathlib.Path) -> np.ndarray:
    """Byte offset of each line [L], and the file's size at the end."""
    offsets, position = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            offsets.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position + 1)
            position += len(chunk)
    starts = np.concatenate(offsets)
    return starts if starts[-1] == position else np.append(starts, position)

"""A folder of pictures, each with its caption in a file of the same stem."""

import os
import pathlib

from cm3jax.data.sources.reading import (
    IMAGE_SUFFIXES,
    caption_in,
    caption_of,
    json_of,
    listing_fingerprint,
    pixels_of,
    read_file,
    text_of,
)
from cm3jax.data.sources.source import Reason, RejectError, check_index
from cm3jax.tokens.document import Document, Image, Text
from cm3jax.tokens.image import MAX_PIXELS


class FolderSource:
    """`a/b.jpg` with `a/b.txt`, or `a/b.json` holding {"caption": ...}; sub-folders included, links not followed.

    Documents are (caption, image) in the order of their paths; ids are the paths without suffix.
    """

    name = "folder"

    def __init__(self, folder: str | pathlib.Path, max_pixels: int = MAX_PIXELS):
        """Lists the folder.

        Raises:
          FileNotFoundError: no such folder, or no picture in it.
        """
        self._folder = pathlib.Path(folder)
        self._max_pixels = max_pixels
        if not self._folder.is_dir():
            raise FileNotFoundError(f"no folder {self._folder}")
        self._images = sorted(_images(self._folder))
        if not self._images:
            raise FileNotFoundError(f"no {'/'.join(IMAGE_SUFFIXES)} file in {self._folder}")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        relative = self._images[index]
        path = self._folder / relative
        key = relative.rpartition(".")[0]
        caption = self._caption(path, key)
        pixels = pixels_of(read_file(path, key), str(path), key, self._max_pixels)
        return Document((Text(caption), Image(pixels=pixels)), id=key)

    def _caption(self, image: pathlib.Path, key: str) -> str:
        as_text, as_json = image.with_suffix(".txt"), image.with_suffix(".json")
        if as_text.is_file():
            return caption_of(text_of(read_file(as_text, key), str(as_text), key), str(as_text), key)
        if as_json.is_file():
            return caption_in(json_of(read_file(as_json, key), str(as_json), key), str(as_json), key)
        raise RejectError(Reason.NO_CAPTION, f"{image}: neither {as_text.name} nor {as_json.name} beside it", key)

    def fingerprint(self) -> str:
        listing = ((name, (self._folder / name).stat().st_size) for name in self._images)
        return listing_fingerprint(self.name, listing, max_pixels=self._max_pixels)


def _images(folder: pathlib.Path) -> list[str]:
    """Relative paths, with "/", of the pictures in `folder` and below; hidden files are left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                found.append(pathlib.Path(parent, name).relative_to(folder).as_posix())
    return found

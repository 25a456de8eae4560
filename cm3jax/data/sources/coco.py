"""COCO captions: one JSON file of captions and a folder of pictures."""

import json
import pathlib
from typing import Any, Literal

import numpy as np

from cm3jax.data.sources.reading import caption_of, inside, listing_fingerprint, pixels_of, read_file
from cm3jax.data.sources.source import Reason, RejectError, check_index
from cm3jax.tokens.document import Document, Image, Text
from cm3jax.tokens.image import MAX_PIXELS


class CocoSource:
    """Documents (caption, image) in the order of the file's "images".

    `caption="first"` gives one document an image, with its first caption; `caption="all"` one document a caption. Every
    document's `meta` has "image_id" and all "captions" of its picture.

    Attributes:
      groups: the image's number for each document; a split must not part the captions of one picture.
    """

    name = "coco"

    def __init__(
        self,
        annotations: str | pathlib.Path,
        images: str | pathlib.Path,
        caption: Literal["first", "all"] = "first",
        max_pixels: int = MAX_PIXELS,
    ):
        """Reads the annotations.

        Raises:
          FileNotFoundError: no annotations file or no image folder.
          ValueError: the file is not of COCO's caption format, or `caption` is not one of the two.
        """
        if caption not in ("first", "all"):
            raise ValueError(f'coco: caption={caption!r}, expected "first" or "all"')
        self._folder = pathlib.Path(images)
        self._annotations = pathlib.Path(annotations)
        self._options = {"caption": caption, "max_pixels": max_pixels}
        self._max_pixels = max_pixels
        if not self._folder.is_dir():
            raise FileNotFoundError(f"no image folder {self._folder}")
        self._files, self._captions = _read(self._annotations)
        counts = [1 if caption == "first" else max(1, len(self._captions[image])) for image in self._files]
        self._ids = list(self._files)
        self.groups = np.repeat(np.arange(len(self._ids)), counts)
        self._caption_number = np.arange(len(self.groups)) - np.repeat(np.cumsum([0, *counts])[:-1], counts)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        image = self._ids[self.groups[index]]
        number = int(self._caption_number[index])
        key = str(image) if self._options["caption"] == "first" else f"{image}/{number}"
        captions = self._captions[image]
        if not captions:
            raise RejectError(Reason.NO_CAPTION, f"{self._annotations}: image {image} has no caption", key)
        caption = caption_of(captions[number], f"{self._annotations}: image {image}", key)
        path = inside(self._folder, self._files[image], key)
        pixels = pixels_of(read_file(path, key), str(path), key, self._max_pixels)
        return Document((Text(caption), Image(pixels=pixels)), key, {"image_id": image, "captions": tuple(captions)})

    def fingerprint(self) -> str:
        listing = [(self._annotations.name, self._annotations.stat().st_size)]
        listing += [(f"{image} {name}", len(self._captions[image])) for image, name in self._files.items()]
        return listing_fingerprint(self.name, listing, **self._options)


def _read(path: pathlib.Path) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """Image id -> file name, and image id -> captions in the file's order."""
    if not path.is_file():
        raise FileNotFoundError(f"no annotations file {path}")
    try:
        content = json.loads(path.read_bytes())
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[Any, list[str]] = {image: [] for image in files}
        for annotation in content["annotations"]:
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f'{path}: not COCO captions, expected "images" and "annotations" ({error!r})') from error
    return files, captions

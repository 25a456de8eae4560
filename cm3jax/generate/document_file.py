"""Documents with holes as JSON files.

    {"segments": [{"text": ["one ", null, " dog"]}, {"image": "dog.png", "mask": "tail.png"}, {"text": null}]}

null is what is missing: a phrase, a whole text, a whole image. Of an image with a mask only what the mask paints white
is missing; with "rows": true whole rows of it. Files are named relative to the JSON file.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cm3jax.generate.generator import Generator
from cm3jax.generate.holes import GappedText, Hole, HoledSegment
from cm3jax.tokens.document import Text
from cm3jax.tokens.image import decode_image

FIELDS = {"text": {"text"}, "image": {"image", "mask", "rows"}}


def read_document(path: Path, generator: Generator) -> tuple[HoledSegment, ...]:
    """The segments of a file.

    Raises:
      ValueError: not such a document; the message names the file and the segment.
      FileNotFoundError: no such file, or none of a picture that it names.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    segments = content.get("segments") if isinstance(content, dict) else None
    if not isinstance(segments, list) or not segments:
        raise ValueError(f'{path}: expected {{"segments": [...]}} with at least one segment')
    found = []
    for number, segment in enumerate(segments):
        try:
            found.append(_segment(segment, path.parent, generator))
        except ValueError as error:
            raise ValueError(f"{path}: segment {number}: {error}") from error
    return tuple(found)


def read_picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a PNG, JPEG or WebP file.

    Raises:
      ValueError: not such a picture, with the file's name.
    """
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _segment(segment: Any, folder: Path, generator: Generator) -> HoledSegment:
    kinds: Mapping[str, Callable[..., HoledSegment]] = {"text": _text, "image": _image}
    kind = next((name for name in kinds if isinstance(segment, dict) and name in segment), None)
    if kind is None:
        raise ValueError(f"{json.dumps(segment)}, expected an object with text or image")
    unknown = set(segment) - FIELDS[kind]
    if unknown:
        raise ValueError(f"unknown {sorted(unknown)[0]!r}, expected one of {', '.join(sorted(FIELDS[kind]))}")
    return kinds[kind](segment, folder, generator)


def _text(segment: Mapping[str, Any], folder: Path, generator: Generator) -> HoledSegment:
    value = segment["text"]
    if value is None:
        return Hole("text")
    if isinstance(value, str):
        return Text(value)
    if not isinstance(value, list) or not all(part is None or isinstance(part, str) for part in value):
        raise ValueError(f"text {json.dumps(value)}, expected a string, null, or a list of those")
    return GappedText(tuple(value))


def _image(segment: Mapping[str, Any], folder: Path, generator: Generator) -> HoledSegment:
    value = segment["image"]
    if value is None:
        return Hole("image")
    if not isinstance(value, str):
        raise ValueError(f"image {json.dumps(value)}, expected the name of a file, or null")
    pixels = read_picture(folder / value)
    if "mask" not in segment:
        return generator.image(pixels)
    return generator.masked_image(pixels, read_picture(folder / segment["mask"]), bool(segment.get("rows", False)))

"""Reading a stranger's files: bounded, inside their folder, and every failure a `RejectError`."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cm3jax.data.sources.source import Reason, RejectError
from cm3jax.tokens.document import Image, Segment, Text
from cm3jax.tokens.image import ImageTooLargeError, decode_image

MAX_FILE_BYTES = 1 << 28
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def read_file(path: pathlib.Path, key: str) -> bytes:
    """The file's bytes, at most `MAX_FILE_BYTES`."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RejectError(Reason.FILE_TOO_LARGE, f"{path}: {size} bytes, expected <= {MAX_FILE_BYTES}", key)
        return path.read_bytes()
    except OSError as error:
        raise RejectError(Reason.MISSING_FILE, f"{path}: {error.strerror}", key) from error


def read_range(path: pathlib.Path, start: int, size: int, what: str, key: str) -> bytes:
    """`size` bytes of a big file; `what` names the part in errors."""
    if size > MAX_FILE_BYTES:
        raise RejectError(Reason.FILE_TOO_LARGE, f"{what}: {size} bytes, expected <= {MAX_FILE_BYTES}", key)
    try:
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise RejectError(Reason.MISSING_FILE, f"{path}: {error.strerror}", key) from error
    if len(content) != size:
        raise RejectError(Reason.MALFORMED, f"{what}: cut short, {len(content)} of {size} bytes", key)
    return content


def inside(folder: pathlib.Path, relative: str, key: str) -> pathlib.Path:
    """`folder / relative`, refused where it leads out of `folder` (also through a link)."""
    path = folder / checked_text(relative, "path", key)
    try:
        stays = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links, NUL in the name
        stays = False
    if not stays:
        raise RejectError(Reason.UNSAFE_PATH, f"path {relative!r} leads out of {folder}", key)
    return path


def pixels_of(content: bytes, what: str, key: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """Decoded image bytes; `what` names them in errors."""
    try:
        return decode_image(content, max_pixels)
    except ImageTooLargeError as error:
        raise RejectError(Reason.IMAGE_TOO_LARGE, f"{what}: {error}", key) from error
    except ValueError as error:
        raise RejectError(Reason.BROKEN_IMAGE, f"{what}: {error}", key) from error


def text_of(content: bytes, what: str, key: str) -> str:
    """UTF-8 bytes as text."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RejectError(Reason.BAD_ENCODING, f"{what}: not UTF-8 at byte {error.start}", key) from error


def json_of(content: bytes, what: str, key: str) -> dict[str, Any]:
    """A JSON object."""
    text = text_of(content, what, key)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RejectError(Reason.MALFORMED, f"{what}: not JSON ({error})", key) from error
    if not isinstance(value, dict):
        raise RejectError(Reason.MALFORMED, f"{what}: expected a JSON object, found {type(value).__name__}", key)
    return value


def caption_of(value: Any, what: str, key: str) -> str:
    """A caption without its outer white space; refused where it is empty or no text at all."""
    caption = value.strip() if isinstance(value, str) else ""
    if not caption:
        raise RejectError(Reason.NO_CAPTION, f"{what}: no caption, found {value!r:.80}", key)
    return checked_text(caption, what, key)


def checked_text(text: str, what: str, key: str) -> str:
    """The text itself; refused with a lone surrogate, which JSON's backslash-u escapes can smuggle in."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectError(Reason.BAD_ENCODING, f"{what}: lone surrogate at character {error.start}", key) from error
    return text


def caption_in(values: Mapping[str, Any], what: str, key: str) -> str:
    """The "caption" of a JSON object, else its "text"."""
    return caption_of(values.get("caption", values.get("text")), what, key)


def segments_in(
    values: Mapping[str, Any], picture: Callable[[str], UInt8[np.ndarray, "H W 3"]], what: str, key: str
) -> tuple[Segment, ...]:
    """The "segments" of a JSON object, [{"text": ...}, {"image": NAME}, ...]; `picture` gives the pixels of a name."""

    def segment(value: Any) -> Segment:
        match value:
            case {"text": str(text)}:
                return Text(checked_text(text, what, key))
            case {"image": str(name)}:
                return Image(pixels=picture(name))
        expected = 'expected {"text": "..."} or {"image": "path"}'
        raise RejectError(Reason.MALFORMED, f"{what}: segment {value!r:.80}, {expected}", key)

    segments = values["segments"]
    if not isinstance(segments, list) or not segments:
        raise RejectError(Reason.MALFORMED, f"{what}: segments {segments!r:.80}, expected a list", key)
    return tuple(segment(value) for value in segments)


def listing_fingerprint(kind: str, listing: Iterable[tuple[str, int]], **options: Any) -> str:
    """Sixteen hex digits of names, sizes and options."""
    digest = hashlib.sha256(json.dumps([kind, options], sort_keys=True).encode())
    for name, size in listing:
        digest.update(os.fsencode(name) + b"\0%d\n" % size)
    return digest.hexdigest()[:16]

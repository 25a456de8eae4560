"""WebDataset: tar files whose members of one key make one sample."""

import dataclasses
import glob
import pathlib
import tarfile
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cm3jax.data.sources.reading import (
    IMAGE_SUFFIXES,
    caption_in,
    caption_of,
    checked_text,
    json_of,
    listing_fingerprint,
    pixels_of,
    read_range,
    segments_in,
    text_of,
)
from cm3jax.data.sources.source import Reason, RejectError, check_index
from cm3jax.tokens.document import Document, Image, Text
from cm3jax.tokens.image import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class _Member:
    """Where a member's bytes lie in its tar; `regular` is False for links, devices and sparse files."""

    name: str
    start: int
    size: int
    regular: bool


@dataclasses.dataclass(frozen=True)
class _Sample:
    tar: pathlib.Path
    key: str
    members: dict[str, _Member]  # by suffix


class WebDatasetSource:
    """Samples with a picture and `.txt`, or `.json` holding {"caption": ...}, as documents (caption, image).

    Neighbouring members with one key, the path up to the first dot of the file name, are one sample; ids are the keys.
    A `.json` may hold {"id": ..., "segments": [{"text": ...}, {"image": "0.jpg"}, ...]} instead, where "0.jpg" is the
    member `KEY.0.jpg`: what `cm3 data ingest` writes.
    The members are listed once, when the source is made, and read where they lie: nothing is unpacked.
    """

    name = "webdataset"

    def __init__(self, pattern: str | pathlib.Path, max_pixels: int = MAX_PIXELS):
        """`pattern`: a tar file, a folder of tar files, or a glob.

        Raises:
          FileNotFoundError: no tar file.
          ValueError: a file that is not an uncompressed tar, or a folder whose ingest is not finished.
        """
        self._max_pixels = max_pixels
        folder = pathlib.Path(pattern)
        if (folder / "settings.json").is_file() and not (folder / "manifest.json").is_file():
            raise ValueError(
                f"{folder}: has no manifest.json, so its ingest is not finished; run the same command again"
            )
        paths = sorted(folder.glob("*.tar") if folder.is_dir() else map(pathlib.Path, glob.glob(str(pattern))))
        if not paths:
            raise FileNotFoundError(f"no tar file at {pattern}")
        self._listing = [(path.name, path.stat().st_size) for path in paths]
        self._samples = [sample for path in paths for sample in _samples(path)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        sample = self._samples[index]
        if "txt" not in sample.members and "json" in sample.members:
            values = json_of(_read(sample, "json"), f"{sample.tar}:{sample.key}", sample.key)
            if "segments" in values:
                return self._interleaved(sample, values)
        caption = self._caption(sample)
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample.members), None)
        if suffix is None:
            raise RejectError(Reason.NO_IMAGE, f"{sample.tar}: {sample.key} has only {_list(sample)}", sample.key)
        return Document((Text(caption), Image(pixels=self._pixels(sample, suffix))), id=sample.key)

    def _interleaved(self, sample: _Sample, values: dict[str, Any]) -> Document:
        what = f"{sample.tar}:{sample.key}"

        def picture(suffix: str) -> UInt8[np.ndarray, "H W 3"]:
            if suffix not in sample.members:
                detail = f"{what} has no {suffix!r:.80}, only {_list(sample)}"
                raise RejectError(Reason.MISSING_FILE, detail, sample.key)
            return self._pixels(sample, suffix)

        key = checked_text(str(values.get("id", sample.key)), what, sample.key)
        return Document(segments_in(values, picture, what, sample.key), id=key)

    def _pixels(self, sample: _Sample, suffix: str) -> UInt8[np.ndarray, "H W 3"]:
        what = f"{sample.tar}:{sample.members[suffix].name}"
        return pixels_of(_read(sample, suffix), what, sample.key, self._max_pixels)

    def _caption(self, sample: _Sample) -> str:
        what, key = f"{sample.tar}:{sample.key}", sample.key
        if "txt" in sample.members:
            return caption_of(text_of(_read(sample, "txt"), what, key), what, key)
        if "json" in sample.members:
            return caption_in(json_of(_read(sample, "json"), what, key), what, key)
        raise RejectError(Reason.NO_CAPTION, f"{what} has only {_list(sample)}, expected txt or json", key)

    def fingerprint(self) -> str:
        return listing_fingerprint(self.name, self._listing, max_pixels=self._max_pixels)


def _samples(path: pathlib.Path) -> list[_Sample]:
    samples: list[_Sample] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                folder, _, file = info.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                regular = info.isreg() and not info.issparse()
                if not samples or samples[-1].key != key or suffix in samples[-1].members:
                    samples.append(_Sample(path, key, {}))
                samples[-1].members[suffix] = _Member(info.name, info.offset_data, info.size, regular)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: not an uncompressed tar file ({error})") from error
    return samples


def _read(sample: _Sample, suffix: str) -> bytes:
    member = sample.members[suffix]
    what = f"{sample.tar}:{member.name}"
    if not member.regular:
        raise RejectError(Reason.MALFORMED, f"{what}: not a regular file", sample.key)
    return read_range(sample.tar, member.start, member.size, what, sample.key)


def _list(sample: _Sample) -> str:
    return ", ".join(sorted(sample.members))

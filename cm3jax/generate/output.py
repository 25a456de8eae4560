"""A folder of results: for each item the best pictures as PNG and everything that was drawn as JSON.

The JSON file is written last, so an item that has one is done and is skipped when the same command runs again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3jax.files import write_atomic
from cm3jax.generate.context import ContextDocument
from cm3jax.generate.generator import Sample
from cm3jax.tokens.document import Image, Text
from cm3jax.tokens.image import encode_png


def is_done(path: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the item of the JSON file `path` is there.

    Raises:
      ValueError: it is there and was asked for with other settings.
    """
    if not path.is_file():
        return False
    found = json.loads(path.read_text()).get("asked", {})
    for name in sorted(found.keys() | asked.keys()):
        if found.get(name) != asked.get(name):
            raise ValueError(
                f"{path} was made with {name} {json.dumps(found.get(name))}, now it is {json.dumps(asked.get(name))}; "
                "give another folder"
            )
    return True


def write_item(path: Path, asked: Mapping[str, Any], samples: Sequence[Sample], keep: int) -> list[Path]:
    """Writes the pictures of the first `keep` samples, then the JSON file `path` about all of them.

    Args:
      samples: best first.

    Returns:
      The paths of the pictures, those that were drawn or drawn in.
    """
    pictures: list[Path] = []
    candidates = []
    for rank, sample in enumerate(samples):
        names = _write_pictures(path, sample, rank, len(samples[:keep])) if rank < keep else []
        pictures += [path.parent / name for name in names]
        candidates.append(_told(sample, names))
    # All samples of an item are of one document, so what was retrieved for one was for all.
    retrieved = [_told_context(document) for document in samples[0].context]
    content = {"asked": dict(asked), "retrieved": retrieved, "candidates": candidates}
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return pictures


def _told_context(document: ContextDocument) -> dict[str, Any]:
    """A retrieved document as the JSON file tells of it."""
    return {
        "id": document.found.id,
        "score": document.found.score,
        "texts": list(document.texts),
        "in_front": document.fits,
    }


def _write_pictures(path: Path, sample: Sample, rank: int, kept: int) -> list[str]:
    if sample.document is None or not any(isinstance(gap, tuple) for gap in sample.gaps):
        return []
    drawn = [segment for segment in sample.document.segments if isinstance(segment, Image)]
    names = []
    for number, image in enumerate(drawn):
        assert image.pixels is not None
        suffix = (f"-{rank}" if kept > 1 else "") + (f"-image{number}" if len(drawn) > 1 else "")
        names.append(f"{path.stem}{suffix}.png")
        write_atomic(path.parent / names[-1], encode_png(image.pixels))
    return names


def _told(sample: Sample, pictures: Sequence[str]) -> dict[str, Any]:
    if sample.document is None:
        return {"seed": sample.seed, "error": sample.error}
    texts = [segment.text for segment in sample.document.segments if isinstance(segment, Text)]
    return {
        "seed": sample.seed,
        "score": sample.score,
        "log_likelihood": sample.log_likelihood,
        "texts": texts,
        "gaps": [gap if isinstance(gap, str) else list(gap) for gap in sample.gaps],
        "pictures": list(pictures),
    }

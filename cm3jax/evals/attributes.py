"""Marks for generated pictures: what the reader tells of them against what was asked for."""

import collections
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cm3jax.models.reader import Reader
from cm3jax.tokens.image import fit

Attributes = Mapping[str, str]


@jax.jit
def _logits(reader: Reader, pixels: UInt8[Array, "B S S 3"]) -> tuple[Float[Array, "B classes"], ...]:
    return reader(pixels.astype(jnp.float32) / 127.5 - 1.0)


def read(reader: Reader, images: Sequence[UInt8[np.ndarray, "H W 3"]], batch_size: int = 64) -> list[dict[str, str]]:
    """The attributes that a reader tells of each picture; pictures of another size are fitted to the reader's."""
    side, attributes = reader.config.image_size, reader.config.attributes
    told: list[dict[str, str]] = []
    for start in range(0, len(images), batch_size):
        fitted = [fit(image, side) for image in images[start : start + batch_size]]
        # Always a whole batch, so that there is one compiled program.
        rows = np.zeros((batch_size, side, side, 3), np.uint8)
        rows[: len(fitted)] = fitted
        classes = [np.argmax(scores, axis=-1) for scores in jax.device_get(_logits(reader, rows))]
        told += [
            {name: values[column[row]] for (name, values), column in zip(attributes, classes, strict=True)}
            for row in range(len(fitted))
        ]
    return told


def score(told: Sequence[Attributes], wanted: Sequence[Attributes]) -> dict[str, float]:
    """Share of right answers for each attribute that is wanted anywhere, and "mean", the mean over attributes.

    An attribute counts where it is wanted; one that was not told is wrong.

    Raises:
      ValueError: other numbers of answers than of questions, or none.
    """
    if len(told) != len(wanted) or not wanted:
        raise ValueError(f"{len(told)} answers for {len(wanted)} wanted attribute sets, expected as many, at least one")
    marks: dict[str, list[bool]] = collections.defaultdict(list)
    for answer, right in zip(told, wanted, strict=True):
        for name, value in right.items():
            marks[name].append(answer.get(name) == value)
    shares = {name: sum(values) / len(values) for name, values in marks.items()}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def chance(attributes: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """What naming a value at random scores, for each (name, values) and in the mean.

    Naming the most frequent of a few hundred answers would seem better than it is: it is picked with them in view.
    """
    shares = {name: 1 / len(values) for name, values in attributes}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval that holds the true share with 95 % (z = 1.96) confidence (Wilson 1927, without continuity).

    Raises:
      ValueError: not 0 <= right <= total, or no trials.
    """
    if not (0 <= right <= total and total > 0):
        raise ValueError(f"wilson: {right} right of {total}, expected 0 <= right <= total and total > 0")
    share = right / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(center - half, 0.0), min(center + half, 1.0)

"""Random numbers for the data path: one independent stream per purpose, seed and position.

Streams are told apart by the spawn key of a `SeedSequence`. Plain seeding by a list is not enough:
`default_rng([seed, epoch])` and `default_rng([seed, epoch, 0])` are the same stream.
"""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What a stream is drawn for. Values are part of what makes a run repeatable: never renumber."""

    SAMPLES = 0
    NEIGHBOURS = 1
    SPAN_COUNTS = 2
    SEQUENCE_ORDER = 3
    SPANS = 4
    IMAGE_ORDER = 5
    IMAGE_CROP = 6
    QUERY_DROPOUT = 7


def generator(purpose: Purpose, seed: int, *position: int) -> np.random.Generator:
    """The generator of (purpose, seed, position), the same on every host.

    Args:
      seed: not negative.
      position: e.g. epoch and index within the epoch; not negative.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(purpose), *position)))

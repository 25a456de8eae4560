"""A mixture: several sets of records as one space of record ids, each with its weight."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Integer

from cm3jax import config
from cm3jax.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:  # a mixture reads records, but opens none: no need for TFDS
    from cm3jax.data.records import Record


class RecordSet(Protocol):
    """What a mixture needs of `cm3jax.data.records.Records`."""

    vocabulary: Vocabulary
    lengths: Integer[np.ndarray, " N"]
    fingerprint: str

    def __getitem__(self, i: int) -> "Record": ...


class Mixture:
    """Record ids count through the parts in order.

    Attributes:
      sizes: records of each part.
      repeats: how often each record of a part is a query in an epoch; a part with 0 is only retrieved from.
      lengths: tokens of every record, by record id.
      vocabulary: of all parts.
      fingerprint: changes when a part or its weight does.
    """

    def __init__(self, parts: Sequence[tuple[RecordSet, float]]):
        """Puts (records, repeat) parts together.

        Raises:
          ValueError: no part, a negative repeat, nothing to repeat, or vocabularies that differ.
        """
        if not parts:
            raise ValueError("a mixture needs at least one set of records")
        self._parts = [records for records, _ in parts]
        self.repeats = [float(repeat) for _, repeat in parts]
        self.sizes = [len(records.lengths) for records in self._parts]
        if min(self.repeats) < 0 or not np.dot(self.sizes, self.repeats) > 0:
            raise ValueError(f"mixture: repeats {self.repeats} of {self.sizes} records, expected >= 0 and some samples")
        self.vocabulary = self._parts[0].vocabulary
        for i, records in enumerate(self._parts):
            if records.vocabulary != self.vocabulary:
                raise ValueError(f"mixture: part {i} has {records.vocabulary}, part 0 has {self.vocabulary}")
        self.lengths = np.concatenate([records.lengths for records in self._parts])
        self.fingerprint = config.fingerprint(
            [[records.fingerprint, repeat] for records, repeat in zip(self._parts, self.repeats, strict=True)]
        )
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, record: int) -> "Record":
        """The record with this id.

        Raises:
          IndexError: no such record.
        """
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)} in the mixture")
        part = int(np.searchsorted(self._starts, record, side="right")) - 1
        return self._parts[part][int(record - self._starts[part])]

"""A train/valid split of any source, the same on every machine."""

from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64

from cm3jax.config import fingerprint
from cm3jax.data.sources.source import GroupedSource, Source, check_index
from cm3jax.tokens.document import Document


class SplitSource:
    """The documents of `source` at `indices`, under one name."""

    def __init__(self, source: Source, split: str, indices: Int64[np.ndarray, " N"], rule: str):
        """`rule`: all that decided on `indices`, for the fingerprint."""
        self.name = source.name
        self._source, self._split, self._indices, self._rule = source, split, indices, rule

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        return self._source[int(self._indices[index])]

    def fingerprint(self) -> str:
        return fingerprint([self._source.fingerprint(), self._split, self._rule])


def split_source(
    source: Source,
    split: Literal["train", "valid"],
    valid_share: float = 0.02,
    valid_count: int | None = None,
    seed: int = 0,
) -> SplitSource:
    """One part of `source`; the two parts are disjoint and together everything, each in the source's order.

    The `valid_count` groups (else a `valid_share` of them, at least one) with the smallest hash of (seed, group) are
    "valid". A group is a document, or what a `GroupedSource` says belongs together.

    Raises:
      ValueError: another split, or a valid part that leaves one of the two empty.
    """
    if split not in ("train", "valid"):
        raise ValueError(f'split {split!r}, expected "train" or "valid"')
    groups = source.groups if isinstance(source, GroupedSource) else np.arange(len(source))
    names = np.unique(groups)
    count = max(1, round(valid_share * len(names))) if valid_count is None else valid_count
    if not 0 < count < len(names):
        raise ValueError(f"source {source.name}: {count} of {len(names)} documents for valid leaves a part empty")
    valid = names[np.argsort(_hash(names, seed), kind="stable")[:count]]
    chosen = np.isin(groups, valid, invert=split == "train")
    return SplitSource(source, split, np.flatnonzero(chosen), f"{count} of {len(names)}, seed {seed}")


def _hash(values: Int64[np.ndarray, " N"], seed: int) -> UInt64[np.ndarray, " N"]:
    """SplitMix64 (Steele, Lea and Flood 2014) of each value, its stream chosen by `seed`."""
    stream = np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    z = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + stream
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

"""Which documents repeat an earlier one.

A document is removed if any document before it in the source, itself removed or not, matches it. This depends on pairs
alone: no order of work and no number of workers can change it. Of documents that all match each other, the first stays.

`Seen` decides in the source's order, in one process. `meeting_places` and `meet` decide the same wherever documents can
be grouped by a key: documents that may match meet at one place at least.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from cm3jax.data.ingest.hash import BAND_BITS, BANDS, DETAILS, bands_of, near
from cm3jax.data.ingest.prepare import Prepared, Signature, signature_of_bytes
from cm3jax.data.ingest.settings import IngestConfig
from cm3jax.data.rejects import Reject
from cm3jax.data.sources.source import Reason

# By rank: a document that matches in several ways is refused for the first.
_REASONS = (
    (Reason.DUPLICATE_ID, "the id of document {}"),
    (Reason.DUPLICATE_DOCUMENT, "the texts and pictures of document {}"),
    (Reason.DUPLICATE_IMAGE, "the pictures of document {}, with other texts"),
    (Reason.NEAR_DUPLICATE_IMAGE, "nearly the pictures of document {}"),
)
_ID, _DOCUMENT, _IMAGES, _NEAR = range(len(_REASONS))

_ROW = np.dtype([("index", np.int64), ("bits", np.uint64, 2), ("detail", np.int8, DETAILS)])


@dataclasses.dataclass(frozen=True, order=True)
class Match:
    """Document `index` of the source repeats document `winner` < `index`; the least of several matches counts."""

    rank: int
    winner: int
    index: int

    def reject(self, document: Prepared) -> Reject:
        """As a refused document."""
        reason, detail = _REASONS[self.rank]
        return Reject(self.index, document.key, reason, detail.format(self.winner))


class NearIndex:
    """Pictures by the bands of their hashes; documents come in the source's order."""

    def __init__(self, distance: int):
        self._distance = distance
        self._rows = np.zeros(64, _ROW)
        self._count = 0
        self._signatures: dict[int, Signature] = {}  # of documents with several pictures
        self._at: dict[int, list[int]] = {}
        self._known: set[bytes] = set()

    def add(self, places: Iterable[int], signature: Signature) -> None:
        """Makes a document known at `places`; one with the hashes of an earlier one would be found no more often."""
        hashes = signature.bits.tobytes() + signature.detail.tobytes()
        if hashes in self._known:
            return
        self._known.add(hashes)
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self._count] = (signature.index, signature.bits[0], signature.detail[0])
        if len(signature.bits) > 1:
            self._signatures[self._count] = signature
        for place in places:
            self._at.setdefault(place, []).append(self._count)
        self._count += 1

    def first(self, places: Iterable[int], signature: Signature) -> int | None:
        """The first document known at one of `places` that has nearly the same pictures."""
        rows = sorted({row for place in places for row in self._at.get(place, ())})
        if not rows:
            return None
        others = self._rows[rows]
        found = near(signature.bits[0], signature.detail[0], others["bits"], others["detail"], self._distance)
        for i in np.flatnonzero(found).tolist():
            if len(signature.bits) == 1 or self._all_near(signature, self._signatures[rows[i]]):
                return int(others["index"][i])
        return None

    def _all_near(self, one: Signature, other: Signature) -> bool:
        pairs = zip(one.bits, one.detail, other.bits, other.detail, strict=True)
        return all(near(b, d, ob[None], od[None], self._distance)[0] for b, d, ob, od in pairs)


class Seen:
    """The documents so far, in the source's order."""

    def __init__(self, config: IngestConfig):
        self._config = config
        self._exact: dict[tuple[int, bytes], int] = {}
        self._near = NearIndex(config.near_distance)

    def match(self, signature: Signature) -> Match | None:
        """What the next document repeats; it is known from now on."""
        for rank, digest in _exact(signature, self._config):
            winner = self._exact.get((rank, digest))
            if winner is not None:
                break
        else:
            rank = _NEAR
            places = [place for place, _ in _near_places(signature, self._config)]
            winner = self._near.first(places, signature)
        self.add(signature)
        return None if winner is None else Match(rank, winner, signature.index)

    def add(self, signature: Signature) -> None:
        """Makes known a document that was judged before."""
        for key in _exact(signature, self._config):
            self._exact.setdefault(key, signature.index)
        homes = [place for place, home in _near_places(signature, self._config) if home]
        if homes:
            self._near.add(homes, signature)


class Visitor(NamedTuple):
    """A document at a meeting place; plain values, for there are some eighty of each document.

    Attributes:
      document: its index in the source.
      home: whether others may repeat it here; if not, it only asks.
      bits, detail: bytes of `Signature.bits` and `Signature.detail`, where they are compared.
    """

    document: int
    home: bool
    bits: bytes
    detail: bytes


def meeting_places(signature: Signature, config: IngestConfig) -> Iterator[tuple[bytes, Visitor]]:
    """(place, visitor) for every place where `signature` may meet a document that it repeats, or is repeated by."""
    for rank, digest in _exact(signature, config):
        yield bytes([rank]) + digest, Visitor(signature.index, True, b"", b"")
    bits, detail = signature.bits.tobytes(), signature.detail.tobytes()
    for place, home in _near_places(signature, config):
        yield bytes([_NEAR]) + place.to_bytes(8, "big"), Visitor(signature.index, home, bits, detail)


def meet(place: bytes, visitors: Iterable[Visitor], config: IngestConfig) -> Iterator[Match]:
    """The matches found at one place, for each document its first."""
    rank = place[0]
    ordered = sorted(Visitor(*visitor) for visitor in visitors)
    if rank != _NEAR:
        yield from (Match(rank, ordered[0].document, visitor.document) for visitor in ordered[1:])
        return
    known = NearIndex(config.near_distance)
    for index, home, bits, detail in ordered:
        signature = signature_of_bytes(index, b"", b"", b"", bits, detail)
        found = known.first([0], signature)
        if found is not None:
            yield Match(rank, found, index)
        if home:
            known.add([0], signature)


def _exact(signature: Signature, config: IngestConfig) -> list[tuple[int, bytes]]:
    keys = [(_ID, signature.id)]
    if config.duplicates != "none":
        keys.append((_DOCUMENT, signature.document))
    if config.duplicates in ("images", "near") and signature.images:
        keys.append((_IMAGES, signature.images))
    return keys


def _near_places(signature: Signature, config: IngestConfig) -> Iterator[tuple[int, bool]]:
    """(place, whether it is known there) of the first picture; documents meet those with as many pictures."""
    pictures = len(signature.bits)
    if config.duplicates != "near" or not pictures:
        return
    homes = bands_of(signature.bits[0])
    for band, home in enumerate(homes.tolist()):
        asked = [home] if signature.probes is None else signature.probes[band].tolist()
        for number in asked:
            yield ((pictures * BANDS + band) << BAND_BITS) | number, number == home

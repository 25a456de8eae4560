"""Exact maximum-inner-product search: fast scores of low precision, then exact ones for the few rows that can matter.

The score of a row x for a query q is their inner product in double precision, rounded to fp32. The result is the k rows
with the largest scores, equal ones by id; it depends neither on the mesh nor on tiles nor on the device.

**The filter** (`retrieval.filter`) computes s~ for all rows and keeps, for each query, the `kept` bins whose best rows
have the largest s~. It also gives `second`, the largest s~ of any row that is not the best of its bin.

**Why the result is exact.** Let q~ and x~ be the vectors as rounded for the filter. For every row

    |s~ - q x| <= |q~ - q| |x~| + |q| |x~ - x| + (g + p) |q~| |x~|  <=  e(q)

by Cauchy-Schwarz for the first two terms; g bounds the rounding of D fp32 additions in any order (Higham 2002, section
3.1; times four, as matrix units need not round to nearest) and p the bits that the place in the bin takes. |x~| and
|x~ - x| are replaced by their maxima over the bank. Let t be the k-th largest exact score of the candidates, the best
rows of the kept bins, and `least` the smallest s~ of a kept bin. A row that is no candidate is

 1. in a bin that was not kept: then s~ <= least, and its score is at most least + e; or
 2. in a kept bin, not its best: then s~ <= second, and its score is at most second + e.

If t > second + e, no row of kind 2 can be in the result. Otherwise all rows of the kept bins whose best has s~ >= t - e
become candidates; the rows of kind 2 that remain have s~ <= the best of their bin < t - e, so score < t. Then t (which
can only have grown) is compared with kind 1: if t > least + e, none of them can be in the result, strictly, so no tie
is lost, and the candidates hold the result. If not, the query is searched again with four times as many bins kept; with
all bins kept there is no row of kind 1. So every query ends with a proof.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float32, Float64, Int64

from cm3jax.retrieval.filter import FOUND, NOTHING, ROWS, WHOLE, Found, filter_step, nothing_found
from cm3jax.retrieval.hits import Bank, Hits, ordered

# Rows whose exact scores are computed at once.
RESCORED = 1 << 14
GROWTH = 4
# The filter counts rows in int32.
MOST_ROWS = (1 << 31) - (1 << 24)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How the bank and the queries are cut. Nothing here changes a result.

    Attributes:
      memory_bytes: on each device, for rows of the bank; a bank that needs more streams from the host.
      query_block: queries on the devices at once.
      tile: rows that are scored at once.
      bin_size: rows of a bin, a power of two.
      spare: bins that are kept beyond k.
      dtype: of the filter's products.
    """

    memory_bytes: int = 1 << 30
    query_block: int = 1024
    tile: int = 8192
    bin_size: int = 32
    spare: int = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        if self.bin_size < 1 or self.bin_size & (self.bin_size - 1) or self.bin_size > 256:
            raise ValueError(f"search bin_size {self.bin_size}, expected a power of two up to 256")
        if self.tile < self.bin_size or self.tile % self.bin_size:
            raise ValueError(f"search tile {self.tile}, expected a multiple of bin_size {self.bin_size}")
        if self.query_block < 1 or self.spare < 1 or self.memory_bytes < 1:
            raise ValueError(f"search: expected query_block, spare and memory_bytes >= 1, found {self}")


class ExactIndex:
    """A bank on the devices of a mesh, or on the host where it is too large for them."""

    def __init__(self, bank: Bank, mesh: jax.sharding.Mesh, config: SearchConfig | None = None):
        """`bank` [N, D] may be a memory map; the devices of `mesh` must all be of this process.

        Raises:
          ValueError: the bank is empty, too large to be counted, or has a value that is not finite; or the memory has
            no room for two bins.
        """
        self.bank, self.mesh, self.config = bank, mesh, config or SearchConfig()
        if len(bank.shape) != 2 or not 0 < len(bank) <= MOST_ROWS:
            raise ValueError(f"bank of shape {bank.shape}, expected [N, D] with 1 <= N <= {MOST_ROWS}")
        self._devices = mesh.size
        self._tile, self._chunk = self._cuts()
        self._norm, self._rounding = self._measure()
        self._resident = self._upload(0) if self.chunks == 1 else None

    @property
    def chunks(self) -> int:
        """Parts in which the bank passes through the devices; 1 if it stays there."""
        return -(-len(self.bank) // self._chunk)

    @property
    def chunk_bytes(self) -> int:
        """Of one part on one device."""
        return self._chunk // self._devices * self._row_bytes

    def search(
        self, queries: Float32[np.ndarray, "Q D"], k: int, exclude: Int64[np.ndarray, " Q"] | None = None
    ) -> Hits:
        """As `hits.Backend.search`.

        Raises:
          ValueError: queries of another width or not finite, or k < 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.bank.shape[1] or k < 1:
            raise ValueError(f"queries {queries.shape} and k {k}, expected [Q, {self.bank.shape[1]}] and k >= 1")
        if not np.isfinite(queries).all():
            raise ValueError("queries: a value is not finite")
        exclude = np.full(len(queries), -1) if exclude is None else np.asarray(exclude)
        ids = np.empty((len(queries), k), np.int64)
        scores = np.empty((len(queries), k), np.float32)
        open_, kept = np.arange(len(queries)), k + 1 + self.config.spare
        while len(open_):
            size = self.config.query_block
            blocks = [open_[start : start + size] for start in range(0, len(open_), size)]
            unproven, ahead = [], self._filter(queries[blocks[0]], kept)
            for number, block in enumerate(blocks):
                found = ahead
                if number + 1 < len(blocks):  # the devices work on the next block while the host scores this one
                    ahead = self._filter(queries[blocks[number + 1]], kept)
                hits, proven = self._finish(queries[block], k, exclude[block], kept, found)
                ids[block], scores[block] = hits.ids, hits.scores
                unproven.append(block[~proven])
            open_, kept = np.concatenate(unproven), kept * GROWTH
        return Hits(ids, scores)

    def _filter(self, queries: Float32[np.ndarray, "Q D"], kept: int) -> Found:
        """Passes the whole bank by the queries; does not wait for the last part."""
        config, count = self.config, len(queries)
        # Few sizes of query blocks, so that few are compiled.
        padded = min(config.query_block, max(32, 1 << math.ceil(math.log2(count))))
        whole = NamedSharding(self.mesh, WHOLE)
        on_device = jax.device_put(np.pad(queries, ((0, padded - count), (0, 0))), whole)
        step = filter_step(self.mesh, self._tile, config.bin_size, kept, config.dtype)
        found = jax.device_put(nothing_found(self._devices, padded, kept), NamedSharding(self.mesh, FOUND))
        for number, rows in enumerate(self._parts()):
            if number:
                jax.block_until_ready(found)  # so that no more than two parts are on the devices
            found = step(found, on_device, rows, np.int32(number * self._chunk), np.int32(len(self.bank)))
        return found

    def _finish(
        self, queries: Float32[np.ndarray, "Q D"], k: int, exclude: Int64[np.ndarray, " Q"], kept: int, found: Found
    ) -> tuple[Hits, Bool[np.ndarray, " Q"]]:
        """The best k by exact scores, and for which queries they are proven."""
        rough, ids, second = _merged(found, len(queries), kept)
        error = self._error(queries)
        # What was not kept anywhere is at most this; nothing was dropped where an empty place was kept.
        least = np.where(ids[:, -1] < 0, -np.inf, rough[:, -1] + error)
        # k + 1 rows, one of which may be excluded, have scores of at least this.
        hopeless = rough < rough[:, k : k + 1] - 2 * error[:, None]
        candidates = np.where(hopeless, -1, ids)
        hits = ordered(candidates, self._scores(queries, candidates), k, exclude)
        for row in np.flatnonzero(hits.scores[:, -1] <= second + error):
            bins = ids[row, (rough[row] >= hits.scores[row, -1] - error[row]) & (ids[row] >= 0)]
            members = np.union1d(self._members(bins), candidates[row])[None]
            more = ordered(members, self._scores(queries[row : row + 1], members), k, exclude[row : row + 1])
            hits.ids[row], hits.scores[row] = more.ids[0], more.scores[0]
        return hits, np.isneginf(least) | (hits.scores[:, -1] > least)

    def _parts(self) -> Iterator[jax.Array]:
        """The parts of the bank; one that is not kept on the devices is sent when it is asked for."""
        if self._resident is not None:
            yield self._resident
        else:
            yield from (self._upload(number) for number in range(self.chunks))

    def _upload(self, number: int) -> jax.Array:
        part = self.bank[number * self._chunk : (number + 1) * self._chunk]
        rows = np.pad(part.astype(self._numpy_dtype), ((0, self._chunk - len(part)), (0, 0)))
        return jax.device_put(rows, NamedSharding(self.mesh, ROWS))

    @property
    def _numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.config.dtype == "bfloat16" else np.float32)

    @property
    def _row_bytes(self) -> int:
        return self.bank.shape[1] * self._numpy_dtype.itemsize

    def _cuts(self) -> tuple[int, int]:
        """Rows of a tile; and of a part over all devices: the whole bank if it fits, else what fits twice."""
        config, share = self.config, -(-len(self.bank) // self._devices)
        tile = min(config.tile, _round_up(share, config.bin_size))
        if _round_up(share, tile) * self._row_bytes <= config.memory_bytes:
            return tile, _round_up(share, tile) * self._devices
        half = config.memory_bytes // (2 * self._row_bytes)
        tile = min(tile, half // config.bin_size * config.bin_size)
        if not tile:
            raise ValueError(
                f"search memory_bytes {config.memory_bytes}, expected room for two times {config.bin_size} rows: "
                f"{2 * self._row_bytes * config.bin_size}"
            )
        return tile, half // tile * tile * self._devices

    def _measure(self) -> tuple[float, float]:
        """The largest |x~| and |x~ - x| of the bank."""
        norm = rounding = 0.0
        for start in range(0, len(self.bank), RESCORED):
            rows = np.asarray(self.bank[start : start + RESCORED], np.float64)
            rounded = rows.astype(np.float32).astype(self._numpy_dtype).astype(np.float64)
            if not np.isfinite(rows).all():
                raise ValueError(f"bank: a value in rows {start} to {start + len(rows) - 1} is not finite")
            norm = max(norm, float(np.sqrt((rounded**2).sum(axis=1).max())))
            rounding = max(rounding, float(np.sqrt(((rounded - rows) ** 2).sum(axis=1).max())))
        return norm, rounding

    def _error(self, queries: Float32[np.ndarray, "Q D"]) -> Float64[np.ndarray, " Q"]:
        """e(q) of the docstring of the module."""
        exact = queries.astype(np.float64)
        rounded = queries.astype(self._numpy_dtype).astype(np.float64)
        length, rounded_length, lost = (np.sqrt((v**2).sum(axis=1)) for v in (exact, rounded, rounded - exact))
        arithmetic = 4 * (queries.shape[1] + 1) * 2.0**-24 + self.config.bin_size * 2.0**-23
        return lost * self._norm + length * self._rounding + arithmetic * rounded_length * self._norm + 1e-30

    def _scores(self, queries: Float32[np.ndarray, "Q D"], ids: Int64[np.ndarray, "Q C"]) -> Float32[np.ndarray, "Q C"]:
        """Exact scores, summed in an order that depends on D alone; -inf for ids of -1."""
        scores = np.full(ids.shape, -np.inf, np.float32)
        query, place = np.nonzero(ids >= 0)
        for start in range(0, len(query), RESCORED):
            of, at = query[start : start + RESCORED], place[start : start + RESCORED]
            products = np.multiply(self.bank[ids[of, at]], queries[of], dtype=np.float64)
            scores[of, at] = products.sum(axis=1)
        return scores

    def _members(self, best: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " M"]:
        """All rows of the bins of which these rows are the best."""
        width = self._tile // self.config.bin_size
        firsts = best // self._tile * self._tile + best % self._tile % width
        members = (firsts[:, None] + width * np.arange(self.config.bin_size)).reshape(-1)
        return members[members < len(self.bank)]


def _merged(
    found: Found, count: int, kept: int
) -> tuple[Float64[np.ndarray, "Q kept"], Int64[np.ndarray, "Q kept"], Float64[np.ndarray, " Q"]]:
    """The best bins of all devices, best first: score and id of the best row; and the best second."""
    scores, ids, second = jax.device_get(found)
    scores, ids = (np.concatenate(part, axis=1)[:count] for part in (scores, ids))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    ids = np.where(scores <= NOTHING / 2, -1, ids).astype(np.int64)
    taken = (np.take_along_axis(part, order, 1) for part in (scores.astype(np.float64), ids))
    return *taken, second.max(axis=0)[:count].astype(np.float64)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

"""Neighbour tables: for every record the documents of the memory that may stand in front of it.

    neighbours-00000-of-00002.npy   one row for each record, memory-mapped (dtype `table_type`)
    settings.json                   what the job was begun with
    manifest.json                   written last: what the table was made from; without it the job is not finished

A table belongs to one directory of records and to one memory, which it knows by their fingerprints.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int64, Shaped

from cm3jax import config
from cm3jax.retrieval.backends import BackendConfig
from cm3jax.retrieval.embeddings import FORMAT, MANIFEST, RetrievalError, open_shard, shard_path
from cm3jax.retrieval.select import SelectionConfig, draw


@dataclasses.dataclass(frozen=True)
class TableManifest:
    """What a finished table says of itself.

    Attributes:
      records: fingerprint of the records that the rows belong to.
      memory: fingerprints of the records that the ids count through, in order, and their sizes.
      embeddings: fingerprints of the queries' embeddings and of the memory's.
      encoder: fingerprint of what made them.
      shards: records in each.
      content: fingerprint of all shards' bytes.
    """

    records: str
    memory: tuple[str, ...]
    memory_sizes: tuple[int, ...]
    embeddings: tuple[str, ...]
    encoder: str
    selection: SelectionConfig
    backend: BackendConfig
    shards: tuple[int, ...]
    content: str = ""
    format: int = FORMAT


def table_type(candidates: int) -> np.dtype:
    """A record's row: rows of the memory and their scores, those found by the image first; -1 where there is none."""
    return np.dtype([("ids", "<i8", (candidates,)), ("scores", "<f4", (candidates,))])


class NeighbourTable:
    """The candidates of every record of a directory, memory-mapped.

    Attributes:
      fingerprint: changes when any candidate does.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a finished table.

        Raises:
          RetrievalError: the manifest or a shard is missing or damaged.
        """
        self.directory = pathlib.Path(directory)
        path = self.directory / MANIFEST
        try:
            self.manifest = config.build(TableManifest, json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise RetrievalError(f"no {path}: no neighbour table, or its job has not finished") from None
        except (ValueError, AttributeError) as error:
            raise RetrievalError(f"damaged manifest {path}: {error}") from error
        sizes, dtype = self.manifest.shards, table_type(self.manifest.selection.candidates)
        paths = [shard_path(self.directory, "neighbours", shard, len(sizes)) for shard in range(len(sizes))]
        self._shards = [open_shard(path, dtype, size) for path, size in zip(paths, sizes, strict=True)]
        self._starts = np.cumsum([0, *sizes])
        self.fingerprint = config.fingerprint(self.manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, records: Int64[np.ndarray, " Q"]) -> Shaped[np.ndarray, " Q"]:
        """The rows of some records, of dtype `table_type`.

        Raises:
          IndexError: no such record.
        """
        if len(records) and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"records {records.min()} to {records.max()} of {len(self)} in {self.directory}")
        result = np.empty(len(records), table_type(self.manifest.selection.candidates))
        owners = np.searchsorted(self._starts, records, side="right") - 1
        for shard in np.unique(owners):
            at = owners == shard
            result[at] = self._shards[shard][records[at] - self._starts[shard]]
        return result


class RecordParts(Protocol):
    """What is asked of the record sets of a mixture."""

    fingerprint: str
    lengths: np.ndarray


class DrawnNeighbours:
    """Draws the documents in front of each query of a mixture from tables; `data.samples.Neighbours`."""

    def __init__(self, parts: Sequence[RecordParts], tables: Sequence[NeighbourTable | None], documents: int):
        """`tables`: one for each of the record sets `parts`; queries of a part without one stand alone.

        Raises:
          RetrievalError: a table belongs to other records, or its memory is not among `parts`.
        """
        if documents < 1:
            raise RetrievalError(f"{documents} retrieved documents, expected at least 1")
        self._tables, self._documents = list(tables), documents
        self._starts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        self._parts = [part.fingerprint for part in parts]
        self._places = [
            None if table is None else self._memory_places(part, table)
            for part, table in zip(parts, tables, strict=True)
        ]
        prints = [None if table is None else table.fingerprint for table in tables]
        self.fingerprint = config.fingerprint([prints, self._parts, documents])

    def _memory_places(self, part: RecordParts, table: NeighbourTable) -> Int64[np.ndarray, " M"]:
        """Where each record set of the table's memory begins in the mixture."""
        manifest = table.manifest
        if manifest.records != part.fingerprint or len(table) != len(part.lengths):
            raise RetrievalError(
                f"{table.directory} was made for records {manifest.records} ({len(table)}), "
                f"these are {part.fingerprint} ({len(part.lengths)})"
            )
        absent = [records for records in manifest.memory if records not in self._parts]
        if absent:
            raise RetrievalError(
                f"{table.directory} retrieves from records {absent}, which are not among the data sets {self._parts}; "
                "add them, with repeat 0 if they are only retrieved from"
            )
        return np.array([self._starts[self._parts.index(records)] for records in manifest.memory])

    def __call__(self, queries: Int64[np.ndarray, " Q"], rng: np.random.Generator) -> Int64[np.ndarray, "Q K"]:
        """Record ids in front of each query, drawn at random from its candidates; -1 where there is none.

        Raises:
          RetrievalError: a table names a query as its own neighbour.
        """
        result = np.full((len(queries), self._documents), -1, np.int64)
        owners = np.searchsorted(self._starts, queries, side="right") - 1
        for number, (table, places) in enumerate(zip(self._tables, self._places, strict=True)):
            if table is None or places is None:
                continue
            at = owners == number
            rows = draw(table.rows(queries[at] - self._starts[number])["ids"], self._documents, rng)
            memory_starts = np.cumsum([0, *table.manifest.memory_sizes])
            owner = np.searchsorted(memory_starts, np.maximum(rows, 0), side="right") - 1
            result[at] = np.where(rows < 0, -1, rows - memory_starts[owner] + places[owner])
            if np.any(result[at] == queries[at][:, None]):
                raise RetrievalError(f"{table.directory} names a record as its own neighbour")
        return result

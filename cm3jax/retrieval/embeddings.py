"""Embeddings on disk: for every record of a directory its vectors, in the records' shards.

embeddings-00000-of-00002.npy   one row for each record, memory-mapped (dtype `row_type`)
settings.json                   what the job was begun with
manifest.json                   written last: what the vectors were made from; without it the job is not finished
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from cm3jax import config

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
TEXT_PART, IMAGE_PART = 1, 2


class RetrievalError(ValueError):
    """Embeddings or neighbours that cannot be made or used; the message names the file."""


@dataclasses.dataclass(frozen=True)
class EmbeddingsManifest:
    """What finished embeddings say of themselves.

    Attributes:
      records, encoder: fingerprints of what was embedded and with what.
      shards: records in each.
      width: of a vector.
      query_dropout, seed: of the queries.
      content: fingerprint of all shards' bytes.
    """

    records: str
    encoder: str
    shards: tuple[int, ...]
    width: int
    query_dropout: float
    seed: int
    content: str = ""
    format: int = FORMAT


def row_type(width: int) -> np.dtype:
    """A record's row: the document's vector; the queries by its image and by its text (0 where it has none); its parts.

    All vectors have length 1. `parts` is the sum of `TEXT_PART` and `IMAGE_PART`, as far as the document has them.
    """
    vector = ("<f4", (width,))
    return np.dtype([("document", *vector), ("image", *vector), ("text", *vector), ("parts", "<u4")])


def shard_path(directory: pathlib.Path, kind: str, shard: int, shards: int) -> pathlib.Path:
    return directory / f"{kind}-{shard:05d}-of-{shards:05d}.npy"


def open_shard(path: pathlib.Path, dtype: np.dtype, rows: int) -> Shaped[np.ndarray, " N"]:
    """Maps a finished shard into memory.

    Raises:
      RetrievalError: it is missing, damaged, or of another size or type.
    """
    try:
        content = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RetrievalError(f"missing or damaged shard {path}: {error}") from error
    if content.dtype != dtype or content.shape != (rows,):
        raise RetrievalError(f"{path}: {content.shape} of {content.dtype}, expected {(rows,)} of {dtype}")
    return content


def is_whole(path: pathlib.Path, kind: np.dtype, rows: int) -> bool:
    """Whether a shard is there as it should be; of a damaged one it is said that it will be written again."""
    if not path.exists():
        return False
    try:
        open_shard(path, kind, rows)
    except RetrievalError as error:
        logger.warning("written again: %s", error)
        return False
    return True


def content_fingerprint(paths: Sequence[pathlib.Path]) -> str:
    """Sixteen hex digits of the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class Embeddings:
    """The embeddings of a directory of records, memory-mapped.

    Attributes:
      fingerprint: changes when any vector, or what it belongs to, does.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a finished directory.

        Raises:
          RetrievalError: the manifest or a shard is missing or damaged.
        """
        self.directory = pathlib.Path(directory)
        path = self.directory / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            self.manifest = config.build(EmbeddingsManifest, values)
        except FileNotFoundError:
            raise RetrievalError(f"no {path}: no embeddings, or their job has not finished") from None
        except (ValueError, AttributeError) as error:
            raise RetrievalError(f"damaged manifest {path}: {error}") from error
        sizes, dtype = self.manifest.shards, row_type(self.manifest.width)
        paths = [shard_path(self.directory, "embeddings", shard, len(sizes)) for shard in range(len(sizes))]
        self.shards = [open_shard(path, dtype, size) for path, size in zip(paths, sizes, strict=True)]
        self.fingerprint = config.fingerprint(self.manifest)

    def __len__(self) -> int:
        return sum(self.manifest.shards)


class Column:
    """One field of several shards as one array: what a search needs of a bank, without copying it."""

    def __init__(self, shards: Sequence[Shaped[np.ndarray, " N"]], field: str):
        self._parts = [shard[field] for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        first = self._parts[0]
        self.shape, self.dtype = (int(self._starts[-1]), *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int64[np.ndarray, " R"]) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(owners):
            at = owners == part
            result[at] = self._parts[part][rows[at] - self._starts[part]]
        return result


def complete(shards: Sequence[Shaped[np.ndarray, " N"]]) -> Bool[np.ndarray, " N"]:
    """Which documents have both text and image."""
    return np.concatenate([shard["parts"] == TEXT_PART | IMAGE_PART for shard in shards])

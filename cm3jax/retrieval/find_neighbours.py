"""The neighbour job: search and selection for every record, shard by shard; killed, the same command goes on."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Shaped

from cm3jax import config
from cm3jax.data.jobs import claim
from cm3jax.files import write_atomic
from cm3jax.parallel.distributed import barrier
from cm3jax.retrieval.backends import BackendConfig, open_backend
from cm3jax.retrieval.embed import PATIENCE_SECONDS, write_array
from cm3jax.retrieval.embeddings import (
    MANIFEST,
    Column,
    Embeddings,
    RetrievalError,
    complete,
    content_fingerprint,
    is_whole,
    shard_path,
)
from cm3jax.retrieval.hits import Backend, hits_by_part
from cm3jax.retrieval.neighbours import TableManifest, table_type
from cm3jax.retrieval.select import SelectionConfig, select

logger = logging.getLogger(__name__)

# Queries whose hits are selected at once; their hits' vectors are read from the bank.
BLOCK = 4096


def find_neighbours(
    queries: Embeddings,
    memory: Sequence[Embeddings],
    out: str | pathlib.Path,
    selection: SelectionConfig,
    backend: BackendConfig,
    mesh: jax.sharding.Mesh,
    *,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Writes the neighbour table of the records of `queries`, whose candidates are documents of `memory`.

    Args:
      memory: may hold `queries` itself; a record is never its own candidate.
      mesh: of this process's devices.
      process, processes: this process takes the shards process, process + processes, ...

    Raises:
      RetrievalError: embeddings of different encoders, or the directory was begun with other settings.
    """
    out = pathlib.Path(out)
    encoders = {embeddings.manifest.encoder for embeddings in (queries, *memory)}
    if len(encoders) != 1 or not memory:
        raise RetrievalError(
            f"embeddings of {len(memory)} memories by encoders {sorted(encoders)}, expected one encoder"
        )
    if queries.manifest.query_dropout != selection.query_dropout:
        raise RetrievalError(
            f"{queries.directory} was embedded with query_dropout {queries.manifest.query_dropout}, "
            f"the rules say {selection.query_dropout}"
        )
    manifest = TableManifest(
        records=queries.manifest.records,
        memory=tuple(embeddings.manifest.records for embeddings in memory),
        memory_sizes=tuple(map(len, memory)),
        embeddings=tuple(embeddings.fingerprint for embeddings in (queries, *memory)),
        encoder=queries.manifest.encoder,
        selection=selection,
        backend=backend,
        shards=queries.manifest.shards,
    )
    if process == 0:
        claim(out, config.to_dict(manifest), RetrievalError)
    barrier("the settings of the neighbour table")
    paths = [shard_path(out, "neighbours", shard, len(manifest.shards)) for shard in range(len(manifest.shards))]
    kind = table_type(selection.candidates)
    mine = [s for s in range(process, len(paths), processes) if not is_whole(paths[s], kind, manifest.shards[s])]
    if mine:
        job = _Job(queries, memory, selection, backend, mesh)
        for shard in mine:
            write_array(paths[shard], job.rows(shard))
            logger.info("%s: %d records", paths[shard], manifest.shards[shard])
    barrier("the neighbours of all shards", PATIENCE_SECONDS)
    # Shards that were made again have the bytes that they had.
    if process == 0 and not (out / MANIFEST).exists():
        manifest = dataclasses.replace(manifest, content=content_fingerprint(paths))
        write_atomic(out / MANIFEST, (json.dumps(config.to_dict(manifest), indent=2) + "\n").encode())
    barrier("the manifest of the neighbour table")


class _Job:
    def __init__(
        self,
        queries: Embeddings,
        memory: Sequence[Embeddings],
        selection: SelectionConfig,
        backend: BackendConfig,
        mesh: jax.sharding.Mesh,
    ):
        shards = [shard for embeddings in memory for shard in embeddings.shards]
        self._queries, self._selection = queries, selection
        self._bank, self._complete = Column(shards, "document"), complete(shards)
        self._backend: Backend = open_backend(self._bank, backend, mesh)
        # Where the queries themselves stand in the memory, if they do.
        starts = np.cumsum([0, *map(len, memory)])
        prints = [embeddings.manifest.records for embeddings in memory]
        own = queries.manifest.records
        self._own = int(starts[prints.index(own)]) if own in prints else None

    def rows(self, shard: int) -> Shaped[np.ndarray, " N"]:
        """The table's rows of one shard of the queries."""
        queries, config_ = self._queries.shards[shard], self._selection
        first = sum(self._queries.manifest.shards[:shard])
        table = np.empty(len(queries), table_type(config_.candidates))
        for start in range(0, len(queries), BLOCK):
            block = queries[start : start + BLOCK]
            places = first + start + np.arange(len(block))
            own = np.full(len(block), -1) if self._own is None else places + self._own
            by_image, by_text = (
                hits_by_part(self._backend, np.ascontiguousarray(block[part]), config_.searched, own)
                for part in ("image", "text")
            )
            taken = select(by_image, by_text, block["document"], self._bank, self._complete, own, config_)
            table["ids"][start : start + BLOCK] = taken.ids
            table["scores"][start : start + BLOCK] = taken.scores
        return table

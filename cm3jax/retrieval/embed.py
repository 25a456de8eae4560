"""The embedding job: vectors of every record, shard by shard; killed at any time, the same command goes on.

Every process embeds its own shards on its own devices; nothing is exchanged between them, so their number may change.
"""

import concurrent.futures
import dataclasses
import io
import json
import logging
import pathlib

import numpy as np
from jaxtyping import Int32, Int64, Shaped, UInt8

from cm3jax import config
from cm3jax.data.jobs import claim
from cm3jax.data.records import Records, read_index
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.sources.source import Source
from cm3jax.files import write_atomic
from cm3jax.parallel.distributed import barrier
from cm3jax.retrieval.embeddings import (
    IMAGE_PART,
    MANIFEST,
    TEXT_PART,
    EmbeddingsManifest,
    RetrievalError,
    content_fingerprint,
    is_whole,
    row_type,
    shard_path,
)
from cm3jax.retrieval.encoder import DocumentEncoder, averaged
from cm3jax.retrieval.select import drop_tokens

logger = logging.getLogger(__name__)

# How long a process waits for the shards of the others.
PATIENCE_SECONDS = 7 * 86_400.0


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """What is encoded of one record: its text whole and as a query, its picture, the patches of the query."""

    text: Int32[np.ndarray, " context"]
    text_query: Int32[np.ndarray, " context"]
    pixels: UInt8[np.ndarray, "S S 3"]
    kept: Int32[np.ndarray, " K"]
    parts: int


def embed(
    records: Records,
    source: Source,
    encoder: DocumentEncoder,
    out: str | pathlib.Path,
    *,
    query_dropout: float,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 4,
) -> None:
    """Writes the embeddings of `records`, whose texts and pictures are those of `source`.

    Of a document with several, its texts are joined by spaces and its first picture counts. Its queries have a random
    share `query_dropout` of their text tokens and image patches dropped, the same at every call.

    Args:
      process, processes: this process takes the shards process, process + processes, ...
      workers: threads that read and decode.

    Raises:
      RetrievalError: the source is not that of the records, or the directory was begun with other settings.
    """
    out = pathlib.Path(out)
    if source.fingerprint() != records.manifest.source:
        raise RetrievalError(
            f"source {source.name} has the fingerprint {source.fingerprint()}, {records.directory} was made from "
            f"{records.manifest.source_name} with {records.manifest.source}"
        )
    split, count = records.manifest.split, records.manifest.shards
    indexes = [read_index(records.directory, split, shard, count).indices for shard in range(count)]
    manifest = EmbeddingsManifest(
        records=records.fingerprint,
        encoder=encoder.fingerprint,
        shards=tuple(map(len, indexes)),
        width=encoder.config.embed_dim,
        query_dropout=query_dropout,
        seed=seed,
    )
    if process == 0:
        claim(out, config.to_dict(manifest), RetrievalError)
    barrier("the settings of the embeddings")
    job = _Job(source, encoder, query_dropout, seed)
    starts = np.cumsum([0, *manifest.shards])
    paths = [shard_path(out, "embeddings", shard, count) for shard in range(count)]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for shard in range(process, count, processes):
            if not is_whole(paths[shard], row_type(manifest.width), len(indexes[shard])):
                rows = job.rows(indexes[shard], int(starts[shard]), pool)
                write_array(paths[shard], rows)
                logger.info("%s: %d records", paths[shard], len(rows))
    barrier("the embeddings of all shards", PATIENCE_SECONDS)
    # Shards that were made again have the bytes that they had.
    if process == 0 and not (out / MANIFEST).exists():
        manifest = dataclasses.replace(manifest, content=content_fingerprint(paths))
        write_atomic(out / MANIFEST, (json.dumps(config.to_dict(manifest), indent=2) + "\n").encode())
    barrier("the manifest of the embeddings")


def write_array(path: pathlib.Path, rows: Shaped[np.ndarray, " N"]) -> None:
    """An `.npy` file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


class _Job:
    def __init__(self, source: Source, encoder: DocumentEncoder, query_dropout: float, seed: int):
        self._source, self._encoder, self._query_dropout, self._seed = source, encoder, query_dropout, seed

    def rows(
        self, indices: Int64[np.ndarray, " N"], first: int, pool: concurrent.futures.Executor
    ) -> Shaped[np.ndarray, " N"]:
        """Embeddings of the documents `indices` of the source, which are the records from `first` on."""
        result, size = np.zeros(len(indices), row_type(self._encoder.config.embed_dim)), self._encoder.batch_size
        for start in range(0, len(indices), size):
            batch = range(start, min(start + size, len(indices)))
            loaded = list(pool.map(lambda i: self._load(int(indices[i]), first + i), batch))
            result[start : batch.stop] = self._encode(loaded)
        return result

    def _load(self, index: int, record: int) -> _Parts:
        """Document `index`, which is record `record`; runs in threads."""
        config_, tokenizer = self._encoder.config, self._encoder.tokenizer
        rng = generator(Purpose.QUERY_DROPOUT, self._seed, record)
        ids, pixels = self._encoder.inputs(self._source[index])
        side, count = config_.image_size, round(config_.patches * (1 - self._query_dropout))
        return _Parts(
            text=tokenizer.row(ids),
            text_query=tokenizer.row(drop_tokens(np.array(ids, np.int32), self._query_dropout, rng).tolist()),
            pixels=np.zeros((side, side, 3), np.uint8) if pixels is None else pixels,
            kept=np.sort(rng.permutation(config_.patches)[: max(1, count)]).astype(np.int32),
            parts=TEXT_PART * bool(ids) + IMAGE_PART * (pixels is not None),
        )

    def _encode(self, loaded: list[_Parts]) -> Shaped[np.ndarray, " B"]:
        encoder = self._encoder
        parts = np.array([part.parts for part in loaded], np.uint32)
        pixels = np.stack([part.pixels for part in loaded])
        text, image = parts & TEXT_PART != 0, parts & IMAGE_PART != 0
        rows = np.zeros(len(loaded), row_type(encoder.config.embed_dim))
        rows["parts"] = parts
        rows["document"] = averaged(
            [
                encoder.texts(np.stack([part.text for part in loaded])) * text[:, None],
                encoder.images(pixels) * image[:, None],
            ]
        )
        rows["text"] = encoder.texts(np.stack([part.text_query for part in loaded])) * text[:, None]
        rows["image"] = encoder.images(pixels, np.stack([part.kept for part in loaded])) * image[:, None]
        return rows

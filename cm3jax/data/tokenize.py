"""From a source to records: a job that can be killed at any time and started again with the same command.

Shard k holds the documents [k, k + 1) * shard_documents of the source that were not refused, so its bytes depend on
nothing but the settings and, for ids seen before, the shards in front of it. A finished shard is skipped.
"""

import collections
import concurrent.futures
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import rich.console
import rich.progress

from cm3jax import config
from cm3jax.data.claim import claim
from cm3jax.data.record_writer import write_manifest, write_shard
from cm3jax.data.records import (
    Manifest,
    RecordsError,
    ShardIndex,
    content_fingerprint,
    id_digest,
    index_path,
    read_index,
)
from cm3jax.data.rejects import Reject, TooManyRejectsError, allowed_rejects
from cm3jax.data.sources.source import Reason, Source
from cm3jax.data.tokenize_documents import DocumentTokenizer, EncodeImages, LoadedDocument, Settings, TokenizeError
from cm3jax.files import write_atomic
from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"

Item = TypeVar("Item")
Result = TypeVar("Result")


def tokenize_source(
    source: Source,
    out: str | pathlib.Path,
    split: str,
    encode_images: EncodeImages,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    image_size: int,
    *,
    image_tokens: int,
    image_tokenizer: str,
    shard_documents: int = 16_384,
    batch_size: int = 32,
    max_reject_share: float = 0.01,
    workers: int = 4,
) -> Manifest:
    """Writes the records of `source` to the directory `out`, and the refused documents to `out/rejects.jsonl`.

    Args:
      split: name of the split for TFDS, "train" or "valid".
      encode_images: pictures uint8[B, image_size, image_size, 3], B <= batch_size, to codes [B, image_tokens].
      image_tokenizer: fingerprint of what `encode_images` computes.
      max_reject_share: the job stops once more of all documents than this are refused.
      workers: threads that read, decode and fit documents.

    Returns:
      The manifest, with the counts.

    Raises:
      TokenizeError: no document, other settings than the directory was begun with, codes of a wrong shape or range.
      TooManyRejectsError: as said above; `rejects.jsonl` holds the refused documents so far.
    """
    out = pathlib.Path(out)
    if not len(source):
        raise TokenizeError(f"source {source.name} has no document")
    if shard_documents < 1 or batch_size < 1 or workers < 1:
        raise TokenizeError(f"{shard_documents=}, {batch_size=}, {workers=}: expected all >= 1")
    if tokenizer.size > vocabulary.text_size:
        raise TokenizeError(f"text tokenizer has {tokenizer.size} ids, the vocabulary {vocabulary.text_size} for text")
    settings = Settings(
        source_name=source.name,
        source=source.fingerprint(),
        documents=len(source),
        split=split,
        vocabulary=vocabulary,
        text_tokenizer=tokenizer.fingerprint,
        image_tokenizer=image_tokenizer,
        image_size=image_size,
        image_tokens=image_tokens,
        shard_documents=shard_documents,
    )
    claim(out, config.to_dict(settings), TokenizeError)
    documents = DocumentTokenizer(source, settings, tokenizer, encode_images, batch_size)
    job = _Job(out, settings, documents, allowed_rejects(len(source), max_reject_share))
    with _progress() as progress, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task(f"tokenizing {source.name}", total=len(source))
        for shard in range(settings.shards):
            job.run_shard(shard, pool, workers, lambda: progress.advance(bar))
            progress.update(bar, completed=min((shard + 1) * shard_documents, len(source)))
    return job.finish()


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=rich.console.Console(stderr=True),
    )


class _Job:
    """The state that goes from shard to shard: ids seen and documents refused."""

    def __init__(self, out: pathlib.Path, settings: Settings, documents: DocumentTokenizer, allowed: int):
        self._out, self._settings, self._documents, self._allowed = out, settings, documents, allowed
        self._seen: set[bytes] = set()
        self._reject_lines: list[str] = []
        self._indexes: list[ShardIndex] = []

    def run_shard(
        self, shard: int, pool: concurrent.futures.Executor, workers: int, advance: Callable[[], None]
    ) -> None:
        """Writes shard `shard`, or takes over the finished one."""
        index = self._finished(shard)
        if index is None:
            begin = shard * self._settings.shard_documents
            indices = range(begin, min(begin + self._settings.shard_documents, self._settings.documents))
            rejects: list[str] = []
            loaded = self._accepted(_ahead(pool, self._documents.load, indices, 2 * workers), rejects, advance)
            index = write_shard(
                self._out,
                self._settings.split,
                shard,
                self._settings.shards,
                self._documents.records(loaded),
                self._settings.vocabulary,
                rejects,
            )
        else:
            self._reject_lines += index.rejects.splitlines(keepends=True)
            self._seen.update(digest.tobytes() for digest in index.digests)
            self._check_rejects()
        self._indexes.append(index)

    def _finished(self, shard: int) -> ShardIndex | None:
        if not index_path(self._out, shard, self._settings.shards).exists():
            return None
        try:
            return read_index(self._out, self._settings.split, shard, self._settings.shards)
        except RecordsError as error:
            logger.warning("shard %d is written again: %s", shard, error)
            return None

    def _accepted(
        self, results: Iterable[LoadedDocument | Reject], rejects: list[str], advance: Callable[[], None]
    ) -> Iterator[LoadedDocument]:
        """The documents that go on, in order; the others are added to `rejects`. The first of equal ids wins."""
        for result in results:
            if isinstance(result, LoadedDocument):
                digest = id_digest(result.id)
                if digest not in self._seen:
                    self._seen.add(digest)
                    yield result
                    advance()
                    continue
                result = Reject(result.index, result.id, Reason.DUPLICATE_ID, f"id {result.id!r} was used before")
            rejects.append(result.line())
            self._reject_lines.append(result.line())
            self._check_rejects()
            advance()

    def _check_rejects(self) -> None:
        if len(self._reject_lines) <= self._allowed:
            return
        self._write_rejects()
        raise TooManyRejectsError(
            f"{len(self._reject_lines)} documents of {self._settings.documents} refused, allowed are {self._allowed}; "
            f"see {self._out / REJECTS}; the last: {self._reject_lines[-1].strip()}"
        )

    def _write_rejects(self) -> None:
        write_atomic(self._out / REJECTS, "".join(self._reject_lines).encode())

    def finish(self) -> Manifest:
        """Writes the log of refused documents, the TFDS metadata and the manifest."""
        settings = self._settings
        manifest = Manifest(
            split=settings.split,
            shards=settings.shards,
            records=sum(len(index.lengths) for index in self._indexes),
            rejects=len(self._reject_lines),
            tokens=sum(int(index.lengths.sum()) for index in self._indexes),
            vocabulary=settings.vocabulary,
            image_tokens=settings.image_tokens,
            image_size=settings.image_size,
            text_tokenizer=settings.text_tokenizer,
            image_tokenizer=settings.image_tokenizer,
            source_name=settings.source_name,
            source=settings.source,
            content=content_fingerprint(self._indexes),
        )
        self._write_rejects()
        write_manifest(self._out, manifest, self._indexes)
        return manifest


def _ahead(
    pool: concurrent.futures.Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """`map(function, items)` in order, with `depth` calls under way, so that memory stays bounded."""
    futures: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) >= depth:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()

"""The ingest in one process, without Apache Beam: shard after shard, reading and checking in threads."""

import concurrent.futures
import functools
import pathlib
from collections.abc import Iterable, Iterator

from cm3jax.data.ingest.duplicates import Seen
from cm3jax.data.ingest.prepare import Prepared, prepare
from cm3jax.data.ingest.settings import Settings
from cm3jax.data.ingest.shards import Judged, read_shard_index, write_shard
from cm3jax.data.jobs import ahead, progress_bar
from cm3jax.data.rejects import Reject
from cm3jax.data.sources.source import Source


def run(source: Source, settings: Settings, out: pathlib.Path, workers: int) -> None:
    """Writes all shards that are not finished. What is remembered of a document takes about two kilobytes."""
    seen = Seen(settings.config)
    load = functools.partial(prepare, source, config=settings.config)
    with progress_bar() as progress, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task(f"ingesting {source.name}", total=settings.documents)
        for shard in range(settings.shards):
            index = read_shard_index(out, settings, shard)
            if index is None:
                results = ahead(pool, load, settings.indices(shard), 2 * workers)
                write_shard(out, settings, shard, judge(progress.track(results, task_id=bar), seen))
            else:
                for signature in index.signatures:
                    seen.add(signature)
            progress.update(bar, completed=settings.indices(shard).stop)


def judge(results: Iterable[Prepared | Reject], seen: Seen) -> Iterator[Judged | Reject]:
    """Each document with what it repeats; the results must come in the source's order."""
    for result in results:
        yield result if isinstance(result, Reject) else (result, seen.match(result.signature))

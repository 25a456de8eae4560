"""The ingest as an Apache Beam pipeline, on any of Beam's runners.

    index ranges ─► prepare ─┬──────────────────────────────────────────────► by shard ─► write
                             └► signatures ─► by meeting place ─► matches ──► by shard ─┘

Pictures are shuffled once, to their shard; the search for duplicates moves signatures alone. Workers open the source
and write the shards themselves, so both must lie where all of them see them at the same path. Beam is an extra, so it
is imported when a pipeline is made.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cm3jax.data.ingest.duplicates import Match, Visitor, meet, meeting_places
from cm3jax.data.ingest.prepare import Prepared, Signature, prepare
from cm3jax.data.ingest.settings import IngestError, Settings
from cm3jax.data.ingest.shards import Judged, read_shard_index, write_shard
from cm3jax.data.rejects import Reject
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Source

# What runs in this process. Under Beam's own name it first looks for another program on the net.
_IN_MEMORY = {"DirectRunner": "FnApiRunner"}
_RANGE = 64  # documents that one worker reads at a time


def require_beam() -> None:
    """Raises IngestError where Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise IngestError('Apache Beam is not installed: pip install "cm3jax[beam]", or take --runner none')


def run(settings: Settings, out: pathlib.Path, runner: str, beam_options: Sequence[str]) -> None:
    """Writes all shards that are not finished, and waits for the end.

    Args:
      runner: one of Beam's, "DirectRunner".
      beam_options: Beam's own, "--flink_master=localhost:8081".
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    indexes = {shard: read_shard_index(out, settings, shard) for shard in range(settings.shards)}
    missing = frozenset(shard for shard, index in indexes.items() if index is None)
    options = PipelineOptions([f"--runner={_IN_MEMORY.get(runner, runner)}", *beam_options], save_main_session=False)
    with beam.Pipeline(options=options) as pipeline:
        items = (
            pipeline
            | "ranges" >> beam.Create(list(_ranges(settings, missing)))
            | "spread" >> beam.Reshuffle()
            | "prepare" >> beam.FlatMap(_prepare_range, settings)
        )
        known = (
            pipeline
            | "finished shards" >> beam.Create(sorted(indexes.keys() - missing))
            | "their signatures" >> beam.FlatMap(_signatures_of_shard, out, settings)
        )
        matches = (
            (items | "signatures" >> beam.FlatMap(_signature_of), known)
            | beam.Flatten()
            | "meeting places" >> beam.FlatMap(meeting_places, settings.config)
            | "group by place" >> beam.GroupByKey()
            | "meet" >> beam.FlatMap(_meet, settings)
            | "of missing shards" >> beam.Filter(_is_of, missing)
        )
        by_shard = {
            "items": items | "item's shard" >> beam.Map(_with_shard, settings),
            "matches": matches,
        }
        _ = by_shard | "group by shard" >> beam.CoGroupByKey() | "write" >> beam.Map(_write, out, settings)


def _ranges(settings: Settings, shards: Iterable[int]) -> Iterator[tuple[int, int]]:
    for shard in sorted(shards):
        indices = settings.indices(shard)
        yield from ((begin, min(begin + _RANGE, indices.stop)) for begin in indices[::_RANGE])


@functools.lru_cache(maxsize=1)
def _opened(spec: str, split: Any, fingerprint: str) -> Source:
    """The source, once in each worker process."""
    source = open_source(spec, split)
    if source.fingerprint() != fingerprint:
        raise IngestError(f"source {spec!r} is another on this worker than where the job was started")
    return source


def _prepare_range(bounds: tuple[int, int], settings: Settings) -> Iterator[Prepared | Reject]:
    source = _opened(settings.spec, settings.split, settings.source)
    for index in range(*bounds):
        yield prepare(source, index, settings.config)


def _signature_of(item: Prepared | Reject) -> Iterator[Signature]:
    if isinstance(item, Prepared):
        yield item.signature


def _signatures_of_shard(shard: int, out: pathlib.Path, settings: Settings) -> Iterator[Signature]:
    index = read_shard_index(out, settings, shard)
    if index is None:
        raise IngestError(f"shard {shard} of {out} was whole when the job was started, and is no more")
    yield from index.signatures


def _meet(group: tuple[bytes, Iterable[Visitor]], settings: Settings) -> Iterator[tuple[int, Match]]:
    for match in meet(*group, settings.config):
        yield match.index // settings.config.shard_documents, match


def _is_of(keyed: tuple[int, Match], shards: frozenset[int]) -> bool:
    return keyed[0] in shards


def _with_shard(item: Prepared | Reject, settings: Settings) -> tuple[int, Prepared | Reject]:
    return item.index // settings.config.shard_documents, item


def _write(group: tuple[int, Mapping[str, Iterable[Any]]], out: pathlib.Path, settings: Settings) -> None:
    shard, values = group
    first: dict[int, Match] = {}
    for match in values["matches"]:
        first[match.index] = min(match, first.get(match.index, match))
    items = sorted(values["items"], key=lambda item: item.index)
    write_shard(out, settings, shard, (_judged(item, first) for item in items))


def _judged(item: Prepared | Reject, first: Mapping[int, Match]) -> Judged | Reject:
    return item if isinstance(item, Reject) else (item, first.get(item.index))

"""`cm3 data ingest`: a job that can be killed at any time and started again with the same command."""

import collections
import logging
import pathlib
from collections.abc import Sequence
from typing import Literal

from cm3jax.data.ingest import local, pipeline
from cm3jax.data.ingest.duplicates import Seen
from cm3jax.data.ingest.prepare import prepare
from cm3jax.data.ingest.settings import IngestConfig, IngestError, Settings
from cm3jax.data.ingest.shards import Manifest, finish, finished
from cm3jax.data.jobs import claim
from cm3jax.data.rejects import Reject
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Source

logger = logging.getLogger(__name__)

IN_PROCESS = "none"
Split = Literal["train", "valid"] | None


def ingest(
    spec: str,
    out: str | pathlib.Path,
    config: IngestConfig,
    *,
    split: Split = None,
    runner: str = "DirectRunner",
    beam_options: Sequence[str] = (),
    workers: int = 4,
) -> Manifest:
    """Writes the good documents of a source to the directory `out`, the others to `out/rejects.jsonl`.

    Both ways of running write the same bytes, and one may finish what the other began.

    Args:
      spec, split: of `open_source`.
      runner: "none" for this process alone, or one of Beam's.
      beam_options: Beam's own, for its runner.
      workers: threads, with the runner "none".

    Returns:
      The manifest, with the counts; that of the finished directory where there is nothing to do.

    Raises:
      IngestError: no document, or none that is good; other settings than the directory was begun with; Beam is needed
        and not installed.
    """
    out = pathlib.Path(out)
    if runner == IN_PROCESS and beam_options:
        raise IngestError(f"options {list(beam_options)} are Beam's, and the runner is {IN_PROCESS!r}")
    if workers < 1:
        raise IngestError(f"workers {workers}, expected >= 1")
    if runner != IN_PROCESS:
        pipeline.require_beam()
    source, settings = _opened(spec, split, config)
    claim(out, settings.flat(), IngestError)
    done = finished(out)
    if done is not None:
        logger.info("%s is finished", out)
        return done
    if runner == IN_PROCESS:
        local.run(source, settings, out, workers)
    else:
        pipeline.run(settings, out.absolute(), runner, beam_options)
    return finish(out, settings)


def preview(spec: str, config: IngestConfig, split: Split = None, documents: int = 500) -> dict[str, int]:
    """What an ingest would do to the first `documents` of a source: counts of "kept" and of each reason."""
    source, settings = _opened(spec, split, config)
    count = min(documents, settings.documents)
    results = (prepare(source, index, config) for index in range(count))
    fates: collections.Counter[str] = collections.Counter()
    for item in local.judge(results, Seen(config)):
        if isinstance(item, Reject):
            fates[item.reason] += 1
        else:
            document, match = item
            fates["kept" if match is None else match.reject(document).reason] += 1
    return dict(sorted(fates.items()))


def _opened(spec: str, split: Split, config: IngestConfig) -> tuple[Source, Settings]:
    source = open_source(spec, split)
    if not len(source):
        raise IngestError(f"source {spec!r} has no document")
    return source, Settings(spec, split, source.name, source.fingerprint(), len(source), config)

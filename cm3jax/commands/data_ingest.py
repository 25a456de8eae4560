"""`cm3 data ingest`: a source without what is broken, too small, no text, or there already."""

import argparse
import dataclasses
import logging
import typing
from pathlib import Path

from cm3jax.commands import HelpFormatter
from cm3jax.data.ingest.job import IN_PROCESS, ingest, preview
from cm3jax.data.ingest.settings import IngestConfig

logger = logging.getLogger(__name__)

EPILOG = f"""examples:
  cm3 data ingest --source folder:photos --out clean --runner {IN_PROCESS}
  cm3 data ingest --source 'webdataset:raw/*.tar' --out clean --min-short-side 256 --duplicates documents
  cm3 data ingest --source 'webdataset:raw/*.tar' --dry-run
  cm3 data ingest --source /shared/raw --out /shared/clean --runner FlinkRunner -- \\
      --flink_master=host:8081 --parallelism=64
  cm3 data tokenize --source webdataset:clean --out records ...
"""

_HELP = {
    "max_short_side": "larger pictures are resized, short side to this, pixels",
    "min_short_side": "smaller pictures are refused, pixels",
    "max_aspect": "longer over shorter side, at most",
    "min_characters": "of all texts of a document, white space not counted",
    "max_characters": "of all texts of a document, white space not counted",
    "min_letter_share": "letters of any script among the characters",
    "max_character_run": "one character in a row, at most",
    "max_word_share": "share of the most frequent of eight and more words",
    "duplicates": "what is removed, each also what the one before it removes",
    "near_distance": "bits of 128 that hashes of nearly the same pictures differ in",
    "picture_format": "of the pictures written",
    "jpeg_quality": "1 to 100",
    "shard_documents": "documents of the source for each shard",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Adds the sub-command to those of `cm3 data`; what names its source is left to the caller."""
    command = commands.add_parser(
        "ingest",
        help="clean a source: check, resize, filter, remove duplicates",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    command.add_argument("--out", type=Path, help="folder to write; the same command resumes")
    command.add_argument("--runner", default="DirectRunner", help=f"Beam's runner, or {IN_PROCESS}: without Beam")
    command.add_argument("--workers", type=int, default=4, help=f"threads, with the runner {IN_PROCESS}")
    command.add_argument("--dry-run", action="store_true", help="say what would happen to the first 500; write nothing")
    kinds = typing.get_type_hints(IngestConfig)
    for field in dataclasses.fields(IngestConfig):
        choices = typing.get_args(kinds[field.name]) or None
        command.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=str if choices else kinds[field.name],
            choices=choices,
            default=field.default,
            help=_HELP[field.name],
        )
    command.add_argument("beam_options", nargs="*", metavar="-- OPTION", help="Beam's own options")
    command.set_defaults(function=run)
    return command


def run(options: argparse.Namespace) -> None:
    """Runs the job, or counts what it would do."""
    config = IngestConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(IngestConfig)})
    if options.dry_run:
        for fate, count in preview(options.source, config, options.split).items():
            print(f"{count:6d} {fate}")
        return
    if options.out is None:
        raise ValueError("--out is missing: the folder to write, or --dry-run")
    manifest = ingest(
        options.source,
        options.out,
        config,
        split=options.split,
        runner=options.runner,
        beam_options=options.beam_options,
        workers=options.workers,
    )
    refused = ", ".join(f"{count} {reason}" for reason, count in manifest.rejects.items()) or "none"
    logger.info("%s: %d of %d documents kept; refused: %s", options.out, manifest.documents, manifest.source, refused)

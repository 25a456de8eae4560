"""`cm3 data`: the embedded data set, cleaning, the text tokenizer, records, and a look at them."""

import argparse
import logging
from pathlib import Path

from cm3jax.commands import HelpFormatter, data_ingest
from cm3jax.data.image_tokenizer import load_image_tokenizer
from cm3jax.data.records import Records
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import usable
from cm3jax.data.tokenize import tokenize_source
from cm3jax.tokens.document import texts
from cm3jax.tokens.text import TextTokenizer, train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

EPILOG = """examples:
  cm3 data scenes --out data --size 256 --train 5000 --truth
  cm3 data train-text --source scenes:count=20000 --vocab-size 512 --out text.model
  cm3 data ingest --source 'webdataset:raw/*.tar' --out clean
  cm3 data tokenize --source coco:captions.json,images --split train --out records/train \\
      --image-tokenizer runs/vqgan --text-tokenizer text.model
  cm3 data show --records records/train --index 0
"""


def train_text(options: argparse.Namespace) -> None:
    source = open_source(options.source, split=options.split)
    lines = (text for document in usable(source) for text in texts(document))
    tokenizer = train_text_tokenizer(lines, options.vocab_size, options.out)
    logger.info("%s: %d pieces", options.out, tokenizer.size)


def tokenize(options: argparse.Namespace) -> None:
    images = load_image_tokenizer(options.image_tokenizer)
    vocabulary = Vocabulary(options.text_size, images.config.codes, options.sentinels, options.vocabulary_size)
    manifest = tokenize_source(
        open_source(options.source, split=options.split),
        options.out,
        options.split or "train",
        images.encode,
        TextTokenizer.load(options.text_tokenizer),
        vocabulary,
        images.config.resolution,
        image_tokens=images.image_tokens,
        image_tokenizer=images.fingerprint,
        shard_documents=options.shard_documents,
        max_reject_share=options.max_reject_share,
        workers=options.workers,
    )
    counts = (manifest.records, manifest.tokens, manifest.rejects)
    logger.info("%s: %d records, %d tokens, %d refused", options.out, *counts)


def scenes(options: argparse.Namespace) -> None:
    from cm3jax.data.scenes.builder import Scenes, ScenesConfig  # drawing and TFDS are not needed by the others

    sizes = {name: getattr(options, name) for name in ("size", "train", "valid", "seed", "truth")}
    name = "-".join(f"{key}{int(value)}" for key, value in sizes.items())
    builder = Scenes(data_dir=options.out, config=ScenesConfig(name=name, **sizes))
    builder.download_and_prepare()
    print(f"tfds:{builder.data_dir},split=train")


def show(options: argparse.Namespace) -> None:
    records = Records(options.records)
    record = records[options.index]
    print(f"{len(records)} records; record {options.index}: id {record.id!r}, segments {record.segments.tolist()}")
    print(" ".join(records.vocabulary.name(int(i)) for i in record.ids))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("cm3 data", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train-text", help="train the text tokenizer", formatter_class=HelpFormatter)
    _add_source(command)
    command.add_argument("--vocab-size", type=int, default=56_320, help="pieces, control ids and bytes included")
    command.add_argument("--out", type=Path, required=True, help="the model file to write")
    command.set_defaults(function=train_text)

    _add_source(data_ingest.add_parser(commands))

    command = commands.add_parser("tokenize", help="encode a source to records", formatter_class=HelpFormatter)
    _add_source(command)
    command.add_argument("--image-tokenizer", type=Path, required=True, help="run directory of a vqgan")
    command.add_argument("--text-tokenizer", type=Path, required=True, help="model file of train-text")
    command.add_argument("--out", type=Path, required=True, help="folder of records; the same command resumes")
    command.add_argument("--text-size", type=int, default=56_320, help="ids kept for text in the vocabulary")
    command.add_argument("--sentinels", type=int, default=512, help="ids kept for <sentinel:i>")
    command.add_argument("--vocabulary-size", type=int, default=65_536, help="all ids, reserved ones included")
    command.add_argument("--shard-documents", type=int, default=16_384, help="documents of one shard")
    command.add_argument("--max-reject-share", type=float, default=0.01, help="more broken documents stop the job")
    command.add_argument("--workers", type=int, default=4, help="threads that read and decode")
    command.set_defaults(function=tokenize)

    command = commands.add_parser("scenes", help="draw the embedded data set to disk", formatter_class=HelpFormatter)
    command.add_argument("--out", type=Path, required=True, help="TFDS data folder")
    command.add_argument("--size", type=int, default=64, help="side of the pictures, pixels, 32 to 512")
    command.add_argument("--train", type=int, default=20_000, help="training documents")
    command.add_argument("--valid", type=int, default=1_000, help="held-out documents")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--truth", action="store_true", help="with segmentation, depth, edges, boxes, questions, edit")
    command.set_defaults(function=scenes)

    command = commands.add_parser("show", help="print one record", formatter_class=HelpFormatter)
    command.add_argument("--records", type=Path, required=True)
    command.add_argument("--index", type=int, default=0)
    command.set_defaults(function=show)
    return root


def _add_source(command: argparse.ArgumentParser) -> None:
    kinds = "scenes | folder: | coco: | webdataset: | jsonl: | tfds: | PATH"
    command.add_argument("--source", required=True, help=kinds)
    command.add_argument("--split", choices=("train", "valid"), help="one part of the source; all of it if not given")


def main(argv: list[str]) -> int:
    """`cm3 data`; `argv` without the command's own name."""
    options = parser().parse_args(argv)
    options.function(options)
    return 0

"""`cm3 generate`: pictures from texts, texts from pictures, and whatever is missing in a document of both."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cm3jax.commands import HelpFormatter
from cm3jax.generate.context import Context
from cm3jax.generate.document_file import read_document, read_picture
from cm3jax.generate.engine import EngineConfig
from cm3jax.generate.generator import Generator, Sample, ranked
from cm3jax.generate.guidance import ContrastiveTopK, alternate
from cm3jax.generate.holes import HoledSegment, modality_of
from cm3jax.generate.output import is_done, write_item
from cm3jax.generate.rerank import Scorer, clip_scorer
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.tasks import Steering, Task, answer, caption, edit, infill, text_to_image
from cm3jax.retrieval.encoder import DocumentEncoder
from cm3jax.retrieval.memory import RULES, Memory, request_encoder
from cm3jax.tokens.document import Text

EPILOG = """examples:
  a picture                 cm3 generate --workdir RUN --prompt "one red dog on the grass at night" --out dog.png
  the best of eight         cm3 generate --workdir RUN --prompt "one red dog" --n 8 --keep 1 --out dog.png
  by CLIP's opinion         cm3 generate --workdir RUN --prompt "one red dog" --n 8 --keep 1 --rerank clip \\
                                --encoder runs/clip --out dog.png
  with two documents        cm3 generate --workdir RUN --prompt "one red dog" --retrieve 2 \\
    like it in front            --memory embeddings/train --out dog.png
  many, resumable           cm3 generate --workdir RUN --prompts captions.txt --n 2 --out pictures/
  half top-p, half CD-K     cm3 generate --workdir RUN --prompts captions.txt --n 8 --cdk 0.5 8 --mixture --out many/
  a caption                 cm3 generate --workdir RUN --image dog.png --caption
  an answer                 cm3 generate --workdir RUN --image dog.png --question "what colour is the dog?"
  an edited picture         cm3 generate --workdir RUN --image dog.png --edit "make it blue" --out blue.png
  a region drawn anew       cm3 generate --workdir RUN --image dog.png --mask tail.png --prompt "one dog" --out new.png
  a missing phrase          cm3 generate --workdir RUN --infill "one <mask> dog on the grass"
  any document with holes   cm3 generate --workdir RUN --document page.json --out page/

Beside each picture stands a JSON file with every sample, its seed, score and log-likelihood. With a folder as --out,
what is done there already is skipped.
"""

Item = tuple[str, tuple[HoledSegment, ...]]


def main(argv: list[str]) -> int:
    """`cm3 generate`; `argv` without the command's own name."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    encoder = _encoder(options)
    memory = _memory(options, encoder)
    generator = Generator.from_run(options.workdir, options.step, EngineConfig(rows=options.batch), memory=memory)
    items = _items(options, generator)
    if options.rerank:
        _check_rankable(items)
    samples = _generate(generator, items, options, _scorer(options, encoder, memory))
    failed = [name for name, found in samples.items() if all(sample.error for sample in found)]
    for name in failed:
        print(f"cm3 generate: {name}: {samples[name][0].error}", file=sys.stderr)
    return 2 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("cm3 generate", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="an lm run")
    add("--step", type=int, help="checkpoint; the newest if not given")
    add("--prompt", help="what is to be drawn; with --mask, what the picture shows")
    add("--prompts", type=Path, help="file with a prompt on each line")
    add("--image", type=Path, help="picture to caption, ask about, edit or draw in")
    add("--caption", action="store_true", help="describe --image")
    add("--question", help="about --image")
    add("--edit", help="what is to become of --image")
    add("--mask", type=Path, help="picture of the size of --image: white is drawn anew")
    add("--rows", action="store_true", help="with --mask: draw whole rows, and see what is below them")
    add("--infill", help="a text with <mask> for each missing phrase")
    add("--document", type=Path, nargs="+", help="JSON files; null stands for what is missing")
    add("--out", type=Path, help="PNG file, or a folder for several")
    add("--n", type=int, default=1, help="samples of each")
    add("--keep", type=int, help="pictures that are written, the likeliest first; all if not given")
    add("--seed", type=int, default=0, help="of the first sample; the next ones follow")
    add("--guidance", type=float, nargs="+", help="weight, or its first and last value over the image; 1 is none; "
        "3 with a prompt, 7.5 for edits, else 1 if not given")  # fmt: skip
    add("--image-guidance", type=float, default=1.5, help="with --edit: weight of the picture")
    add("--unconditional", choices=("mask", "drop"), default="mask", help="what guidance compares with")
    add("--cdk", type=float, nargs=2, metavar=("ALPHA", "K"), help="contrastive decoding in place of --guidance")
    add("--mixture", action="store_true", help="--cdk for every second sample, --guidance for the others")
    add("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    add("--top-p", type=float, default=0.9, help="share of the probability that is sampled from")
    add("--top-k", type=int, default=0, help="tokens that are sampled from; 0 for all")
    add("--min-p", type=float, default=0.0, help="least share of the most likely token's probability")
    add("--repetition-penalty", type=float, default=1.0, help="of texts")
    add("--max-text", type=int, default=64, help="tokens of a missing text, at most")
    add("--retrieve", type=int, help="documents of --memory that stand in front, at most")
    add("--memory", type=Path, help="folder of embeddings, as `cm3 retrieval embed` writes it")
    add("--records", type=Path, help="of the memory, where they are not where they were when it was embedded")
    add("--max-score", type=float, help=f"a document with more is too much like the request; {RULES.max_score}")
    add("--max-similarity", type=float, help=f"of two documents, and of one to the request; {RULES.max_similarity}")
    add("--rerank", choices=("clip",), help="what ranks samples in place of the model's own log-likelihood")
    add("--encoder", type=Path, help="a clip run, or a file of CLIP's weights; the memory's if not given")
    add("--encoder-size", help="of a file: vit-b-32 or vit-l-14")
    add("--encoder-tokenizer", help="of a file: CLIP's merges")
    add("--batch", type=int, default=EngineConfig.rows, help="samples at a time")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with a line about what does not go together."""
    ways = {
        "--prompt": options.prompt is not None and options.image is None,
        "--prompts": options.prompts is not None,
        "--infill": options.infill is not None,
        "--document": options.document is not None,
        "--image": options.image is not None,
    }
    if sum(ways.values()) != 1:
        parser.error(f"give exactly one of {', '.join(ways)}")
    about = (options.caption, options.question is not None, options.edit is not None, options.mask is not None)
    if options.image is not None and sum(about) != 1:
        parser.error("give --image with exactly one of --caption, --question, --edit, --mask")
    draws = not (options.caption or options.question or options.infill)
    if draws and options.out is None:
        parser.error("give --out: a PNG file, or a folder")
    several = options.prompts is not None or options.document is not None
    if several and options.out is not None and options.out.suffix == ".png":
        parser.error(f"--out {options.out}: give a folder for several results")
    if options.n < 1 or (options.keep is not None and not 1 <= options.keep <= options.n):
        parser.error(f"--n {options.n} --keep {options.keep}: expected 1 <= keep <= n")
    if (options.retrieve is None) != (options.memory is None) or (
        options.retrieve is not None and options.retrieve < 1
    ):
        parser.error("--retrieve N (at least 1) and --memory DIR go together")
    if options.rerank and options.encoder is None and options.memory is None:
        parser.error("--rerank clip needs an --encoder, or the one of a --memory")
    if options.mixture and options.cdk is None:
        parser.error("--mixture needs --cdk")
    if options.guidance is not None and (len(options.guidance) > 2 or (options.cdk and not options.mixture)):
        parser.error("--guidance takes one or two weights, and goes with --cdk only in a --mixture")


def _encoder(options: argparse.Namespace) -> DocumentEncoder | None:
    """The one that is named; None leaves it to the memory."""
    if options.encoder is None:
        return None
    return request_encoder(options.encoder, size=options.encoder_size, tokenizer=options.encoder_tokenizer)


def _memory(options: argparse.Namespace, encoder: DocumentEncoder | None) -> Memory | None:
    if options.memory is None:
        return None
    given = {"max_score": options.max_score, "max_similarity": options.max_similarity}
    rules = dataclasses.replace(RULES, **{name: value for name, value in given.items() if value is not None})
    return Memory.load(options.memory, records=options.records, encoder=encoder, selection=rules)


def _scorer(options: argparse.Namespace, encoder: DocumentEncoder | None, memory: Memory | None) -> Scorer | None:
    if options.rerank is None:
        return None
    if encoder is None:
        assert memory is not None
        encoder = memory.encoder
    return clip_scorer(encoder)


def _items(options: argparse.Namespace, generator: Generator) -> list[Item]:
    """Name and document of each thing to generate."""
    if options.prompts is not None:
        lines = [line for line in options.prompts.read_text().splitlines() if line.strip()]
        return [(f"{number:05d}", text_to_image(line)) for number, line in enumerate(lines)]
    if options.document is not None:
        return [(path.stem, read_document(path, generator)) for path in options.document]
    return [("sample", _segments(options, generator))]


def _check_rankable(items: Sequence[Item]) -> None:
    """Raises a ValueError for a document without text or without picture, before anything is drawn."""
    for name, segments in items:
        kinds = {modality_of(segment) for segment in segments}
        if len(kinds) == 1:
            raise ValueError(f"{name}: --rerank clip compares text with picture, the document has {kinds.pop()} alone")


def _segments(options: argparse.Namespace, generator: Generator) -> tuple[HoledSegment, ...]:
    if options.infill is not None:
        return (infill(options.infill),)
    if options.image is None:
        return text_to_image(options.prompt)
    pixels = read_picture(options.image)
    if options.mask is not None:
        masked = generator.masked_image(pixels, read_picture(options.mask), options.rows)
        return (masked,) if options.prompt is None else (Text(options.prompt), masked)
    image = generator.image(pixels)
    if options.edit is not None:
        return edit(image, options.edit)
    return caption(image) if options.caption else answer(options.question, image)


def _steerings(options: argparse.Namespace) -> list[Steering]:
    """Of each sample."""
    from_text = options.prompt is not None or options.prompts is not None
    default = [7.5] if options.edit else [3.0] if from_text else [1.0]
    weights = options.guidance or default
    scale = weights[0] if len(weights) == 1 else (weights[0], weights[1])
    image_scale = options.image_guidance if options.edit else None
    guided = Steering(scale, image_scale, options.unconditional)
    if options.cdk is None:
        return [guided] * options.n
    contrast = Steering(cdk=ContrastiveTopK(options.cdk[0], int(options.cdk[1])), unconditional=options.unconditional)
    return alternate(options.n, guided, contrast) if options.mixture else [contrast] * options.n


def _generate(
    generator: Generator, items: Sequence[Item], options: argparse.Namespace, scorer: Scorer | None
) -> dict[str, list[Sample]]:
    """Samples of each item that is not done yet, best first; written or printed as soon as they are complete."""
    asked = {name: value for name, value in _plain(options).items() if name not in ("out", "batch")}
    targets = {name: _target(options.out, name) for name, _ in items}
    items = [(name, segments) for name, segments in items if not _is_done(options, targets[name], asked)]
    sampling = SamplingConfig(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
    )
    tasks = [
        Task(segments, options.seed + i, steering, sampling, sampling, options.max_text, retrieve=options.retrieve or 0)
        for _, segments in items
        for i, steering in enumerate(_steerings(options))
    ]
    found: dict[str, list[Sample]] = {name: [] for name, _ in items}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("samples", total=len(tasks))

        def done(place: int, sample: Sample) -> None:
            progress.advance(bar)
            name = items[place // options.n][0]
            found[name].append(sample)
            if len(found[name]) == options.n:
                found[name] = ranked(found[name], scorer)
                _publish(targets[name], asked, found[name], options.keep or options.n)

        generator.complete(tasks, on_done=done)
    return found


def _publish(target: Path | None, asked: dict[str, Any], samples: Sequence[Sample], keep: int) -> None:
    if samples[0].error is not None:
        return
    pictures = [] if target is None else write_item(target, asked, samples, keep)
    if asked["retrieve"]:
        _tell_context(samples[0].context, asked["retrieve"])
    for path in pictures:
        print(path)
    for sample in samples[:keep]:
        for gap in sample.gaps:
            if isinstance(gap, str):
                print(gap)


def _tell_context(context: Context, wanted: int) -> None:
    """On stderr, so that stdout has results alone."""
    used = sum(document.fits for document in context)
    print(f"{used} of {wanted} documents in front", file=sys.stderr)
    for document in context:
        found = document.found
        left_out = "" if document.fits else "; left out: no room"
        print(f"  {found.score:.4f} {found.id!r} {' | '.join(document.texts)!r}{left_out}", file=sys.stderr)


def _target(out: Path | None, name: str) -> Path | None:
    """The JSON file of an item."""
    if out is None:
        return None
    return out.with_suffix(".json") if out.suffix == ".png" else out / f"{name}.json"


def _is_done(options: argparse.Namespace, target: Path | None, asked: dict[str, Any]) -> bool:
    """In a folder; a single file is written again."""
    return target is not None and options.out.suffix != ".png" and is_done(target, asked)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON has them."""
    return json.loads(json.dumps(vars(options), default=str))

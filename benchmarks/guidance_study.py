"""What guidance is worth on a trained quickstart model: how many of the asked attributes its pictures show.

Every way to decode draws the same held-out captions with the same seeds, and the quickstart's reader tells what it
sees; intervals are of 95 % (Wilson, over all answers). Then masked objects: the boxes of a picture's subjects are
masked, and the caption asks for another colour than they had.

    python benchmarks/guidance_study.py --quickstart runs/quickstart [--documents 128]

Writes benchmarks/results/guidance_study-DATE.json after each way, and the table beside it at the end. Started again on
the same day, it keeps what is there.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, header

from cm3jax.data.scenes.drawing import draw
from cm3jax.data.scenes.language import short_caption
from cm3jax.data.scenes.render import render
from cm3jax.data.scenes.space import ATTRIBUTES, Scene, sample
from cm3jax.data.scenes.truth import truth
from cm3jax.evals.attributes import chance, read, score, wilson
from cm3jax.files import write_atomic
from cm3jax.generate.engine import EngineConfig
from cm3jax.generate.generator import Generator, Sample
from cm3jax.generate.guidance import ContrastiveTopK
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.tasks import Steering, Task, text_to_image
from cm3jax.generate.text_image import TextImageModel
from cm3jax.models.reader import Reader
from cm3jax.tasks.reader import load_reader
from cm3jax.tokens.document import Text, pictures

TOP_P = SamplingConfig(top_p=0.9)
BEST_OF = 8
ROUNDED = {
    "int8 weights": EngineConfig(weights="int8"),
    "int8 keys and values": EngineConfig(cache="int8"),
    "int8 of both": EngineConfig(weights="int8", cache="int8"),
}
ORDERS = {"raster order": False, "whole rows": True}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to decode. `other` is that of every second sample."""

    name: str
    steering: Steering
    sampling: SamplingConfig = TOP_P
    other: tuple[Steering, SamplingConfig] | None = None
    samples: int = 1

    def task(self, scene: Scene, seed: int, number: int) -> Task:
        steering, sampling = self.other if self.other and number % 2 else (self.steering, self.sampling)
        return Task(text_to_image(short_caption(scene)), seed, steering, image=sampling)


def ways() -> list[Way]:
    """What is compared."""
    plain, cdk = SamplingConfig(), Steering(cdk=ContrastiveTopK(0.5, 8))
    weights = [Way(f"guidance {w:g}, top-p 0.9", Steering(w)) for w in (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)]
    rising = Way("guidance 1 rising to 5, top-p 0.9", Steering((1.0, 5.0)))
    top_p = [Way(f"guidance 3, top-p {p:g}", Steering(3.0), SamplingConfig(top_p=p)) for p in (0.5, 0.8, 1.0)]
    contrasts = [
        Way(f"CD-K, alpha {alpha:g}, k {k}", Steering(cdk=ContrastiveTopK(alpha, k)), plain)
        for alpha, k in ((0.1, 1), (0.5, 1), (0.1, 8), (0.5, 8), (0.9, 8), (0.5, 32))
    ]
    best = [
        Way(f"likeliest of {BEST_OF}: guidance 3, top-p 0.9", Steering(3.0), samples=BEST_OF),
        Way(f"likeliest of {BEST_OF}: CD-K", cdk, plain, samples=BEST_OF),
        Way(f"likeliest of {BEST_OF}: half of each", Steering(3.0), TOP_P, (cdk, plain), BEST_OF),
    ]
    return [*weights, rising, *top_p, *contrasts, *best]


def drawn(generator: Generator, way: Way, scenes: Sequence[Scene]) -> list[np.ndarray]:
    """One picture for each scene: of several samples the likeliest."""
    tasks = [way.task(scene, 1000 * i + n, n) for i, scene in enumerate(scenes) for n in range(way.samples)]
    samples = [found[0] for found in generator.complete(tasks)]
    groups = [samples[i : i + way.samples] for i in range(0, len(samples), way.samples)]
    return [picture_of(max(group, key=lambda sample: sample.score)) for group in groups]


def picture_of(done: Sample) -> np.ndarray:
    """Raises a ValueError if there is none."""
    if done.document is None:
        raise ValueError(done.error)
    return pictures(done.document)[-1]


def marks(reader: Reader, images: list[np.ndarray], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Share of right answers by attribute, their mean, and the mean's interval."""
    shares = score(read(reader, images), [scene.attributes for scene in scenes])
    answers = len(scenes) * len(ATTRIBUTES)
    return shares | {"interval": wilson(round(shares["mean"] * answers), answers)}


def recoloured(generator: Generator, reader: Reader, scenes: Sequence[Scene], rows: bool) -> dict[str, Any]:
    """How often a masked object comes back in the colour that was asked for, and whether known codes stayed."""
    colors, size = ATTRIBUTES["color"], generator.model.image_tokenizer.config.resolution
    asked = [scene.with_value("color", colors[(colors.index(scene.color) + 3) % len(colors)]) for scene in scenes]
    masked = [generator.masked_image(render(scene, size), boxes(scene, size), rows) for scene in scenes]
    tasks = [
        Task((Text(short_caption(wanted)), image), 1000 * i, Steering(3.0), image=TOP_P)
        for i, (wanted, image) in enumerate(zip(asked, masked, strict=True))
    ]
    samples = [found[0] for found in generator.complete(tasks)]
    fitting = [i for i, done in enumerate(samples) if done.error is None]
    untouched = 0
    for i in fitting:
        codes = samples[i].document.segments[1].codes  # type: ignore[union-attr]
        untouched += bool(np.all((codes == masked[i].codes) | masked[i].unknown))
    told = read(reader, [picture_of(samples[i]) for i in fitting])
    right = sum(answer["color"] == asked[i].color for answer, i in zip(told, fitting, strict=True))
    share = right / len(fitting)
    return {
        "documents": len(fitting),
        "share": share,
        "interval": wilson(right, len(fitting)),
        "times_chance": share / chance([("color", colors)])["color"],
        "untouched": untouched,
        "masked_codes": float(np.mean([image.unknown.mean() for image in masked])),
    }


def boxes(scene: Scene, size: int) -> np.ndarray:
    """White where a subject is, [size, size, 3]."""
    mask = np.zeros((size, size, 3), np.uint8)
    for box in truth(draw(scene), size).boxes:
        left, top, right, bottom = np.clip(np.rint(box * size).astype(int), 0, size)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = 255
    return mask


def resumed(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The report so far, or an empty one.

    Raises:
      ValueError: the file has results of other inputs.
    """
    if not path.exists():
        return header | {"ways": {}, "masked": {}}
    report = json.loads(path.read_text())
    if report["inputs"] != header["inputs"]:
        raise ValueError(f"{path} has results of {report['inputs']}, expected {header['inputs']}: move it away")
    return report


def measure(report: dict[str, Any], model: TextImageModel, reader: Reader, path: Path) -> None:
    """Fills in what the report lacks, and writes it after each figure."""
    scenes = [sample(0, "valid", i) for i in range(report["inputs"]["documents"])]
    scenes = [scene for scene in scenes if model.fits(short_caption(scene))]
    report["fitting"] = len(scenes)
    tokenizer, generator = model.image_tokenizer, Generator(model)
    size = tokenizer.config.resolution

    def keep(part: str, name: str, figure: Callable[[], dict[str, Any]]) -> None:
        if name not in report[part]:
            report[part][name] = figure()
            write_atomic(path, json.dumps(report, indent=2).encode())
            print(part, name, report[part][name], flush=True)

    def through_tokens() -> list[np.ndarray]:
        return list(tokenizer.decode(tokenizer.encode(np.stack([render(scene, size) for scene in scenes]))))

    keep("ways", "the true pictures", lambda: marks(reader, [render(scene, size) for scene in scenes], scenes))
    keep("ways", "the true pictures' codes", lambda: marks(reader, through_tokens(), scenes))
    for way in ways():
        keep("ways", way.name, lambda way=way: marks(reader, drawn(generator, way, scenes), scenes))
    for name, config in ROUNDED.items():
        usual = Way(f"guidance 3, top-p 0.9, {name}", Steering(3.0))

        def rounded(config: EngineConfig = config, way: Way = usual) -> dict[str, Any]:
            return marks(reader, drawn(Generator(model, model.make_engine(config)), way, scenes), scenes)

        keep("ways", usual.name, rounded)
    for name, rows in ORDERS.items():
        keep("masked", name, lambda rows=rows: recoloured(generator, reader, scenes, rows))


def page(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        f"# Guidance study, {report['date']}",
        "",
        f"`{report['command']}`",
        "",
        f"{report['device']}, {report['machine']}, jax {report['jax']}; {report['fitting']} held-out captions.",
        "",
        "| way | attributes | interval | subject | color |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, shares in report["ways"].items():
        low, high = shares["interval"]
        columns = f"{shares['mean']:.3f} | {low:.3f} to {high:.3f} | {shares['subject']:.3f} | {shares['color']:.3f}"
        lines.append(f"| {name} | {columns} |")
    lines += [
        "",
        "| masked objects | asked colour | interval | times chance | known codes untouched | codes masked |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in report["masked"].items():
        low, high = found["interval"]
        lines.append(
            f"| {name} | {found['share']:.3f} | {low:.3f} to {high:.3f} | {found['times_chance']:.1f} | "
            f"{found['untouched']} of {found['documents']} | {found['masked_codes']:.0%} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--documents", type=int, default=128)
    options = parser.parse_args()
    run = options.quickstart / "decoder"
    begin = header()
    path = RESULTS / f"guidance_study-{begin['date']}.json"
    inputs = {"decoder": json.loads((run / "done.json").read_text()), "documents": options.documents}
    report = resumed(path, begin | {"inputs": inputs})
    measure(report, TextImageModel.load(run), load_reader(options.quickstart / "reader"), path)
    text = page(report)
    write_atomic(path.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()

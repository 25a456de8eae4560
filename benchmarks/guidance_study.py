"""What guidance is worth on a trained quickstart model: how many of the asked attributes its pictures show.

Every way to decode draws the same held-out captions with the same seeds, and the quickstart's reader tells what it
sees; intervals are of 95 % (Wilson). Then masked objects: the boxes of a picture's subjects are masked, and the caption
asks for another colour than they had.

    python benchmarks/guidance_study.py --quickstart runs/quickstart [--documents 128] [--out FILE.md]
"""

import argparse
import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cm3jax.data.scenes.drawing import draw
from cm3jax.data.scenes.language import short_caption
from cm3jax.data.scenes.render import render
from cm3jax.data.scenes.space import ATTRIBUTES, Scene, sample
from cm3jax.data.scenes.truth import truth
from cm3jax.evals.attributes import chance, read, score, wilson
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


def row(name: str, reader: Reader, images: list[np.ndarray], scenes: Sequence[Scene]) -> str:
    """A line of the table: share of right attributes, its interval, subject and colour."""
    shares = score(read(reader, images), [scene.attributes for scene in scenes])
    answers = len(scenes) * len(ATTRIBUTES)
    low, high = wilson(round(shares["mean"] * answers), answers)
    columns = f"{shares['mean']:.3f} | {low:.3f} to {high:.3f} | {shares['subject']:.3f} | {shares['color']:.3f}"
    return f"| {name} | {columns} |"


def recoloured(generator: Generator, reader: Reader, scenes: Sequence[Scene], rows: bool) -> str:
    """A line of the second table: how often a masked object comes back in the colour that was asked for."""
    colors, size = ATTRIBUTES["color"], generator.model.image_tokenizer.config.resolution
    asked = [scene.with_value("color", colors[(colors.index(scene.color) + 3) % len(colors)]) for scene in scenes]
    tasks, untouched = [], 0
    masked = [generator.masked_image(render(scene, size), boxes(scene, size), rows) for scene in scenes]
    for i, (wanted, image) in enumerate(zip(asked, masked, strict=True)):
        tasks.append(Task((Text(short_caption(wanted)), image), 1000 * i, Steering(3.0), image=TOP_P))
    samples = [found[0] for found in generator.complete(tasks)]
    fitting = [i for i, done in enumerate(samples) if done.error is None]
    for i in fitting:
        codes = samples[i].document.segments[1].codes  # type: ignore[union-attr]
        untouched += bool(np.all((codes == masked[i].codes) | masked[i].unknown))
    told = read(reader, [picture_of(samples[i]) for i in fitting])
    right = sum(answer["color"] == asked[i].color for answer, i in zip(told, fitting, strict=True))
    low, high = wilson(right, len(fitting))
    by_chance = chance([("color", colors)])["color"]
    name = "whole rows, with what is below in view" if rows else "in raster order"
    share = right / len(fitting)
    return (
        f"| {name} | {share:.3f} | {low:.3f} to {high:.3f} | {share / by_chance:.1f} | {untouched} of {len(fitting)} |"
    )


def boxes(scene: Scene, size: int) -> np.ndarray:
    """White where a subject is, [size, size, 3]."""
    mask = np.zeros((size, size, 3), np.uint8)
    for box in truth(draw(scene), size).boxes:
        left, top, right, bottom = np.clip(np.rint(box * size).astype(int), 0, size)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = 255
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--out", type=Path, help="by default a dated file in benchmarks/results")
    options = parser.parse_args()
    model = TextImageModel.load(options.quickstart / "decoder")
    reader = load_reader(options.quickstart / "reader")
    scenes = [sample(0, "valid", i) for i in range(options.documents)]
    scenes = [scene for scene in scenes if model.fits(short_caption(scene))]
    generator = Generator(model)
    lines = [f"{len(scenes)} held-out captions.", "", "| way | attributes | interval | subject | color |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for way in ways():
        lines.append(row(way.name, reader, drawn(generator, way, scenes), scenes))
        print(lines[-1], flush=True)
    for name, config in (
        ("int8 weights", EngineConfig(weights="int8")),
        ("int8 keys and values", EngineConfig(cache="int8")),
        ("int8 of both", EngineConfig(weights="int8", cache="int8")),
    ):
        rounded = Generator(model, model.make_engine(config))
        way = Way(f"guidance 3, top-p 0.9, {name}", Steering(3.0))
        lines.append(row(way.name, reader, drawn(rounded, way, scenes), scenes))
        print(lines[-1], flush=True)
    lines += ["", "| masked objects | asked colour | interval | times chance | known codes untouched |"]
    lines += [
        "| --- | --- | --- | --- | --- |",
        *(recoloured(generator, reader, scenes, rows) for rows in (False, True)),
    ]
    today = datetime.date.today().isoformat()
    out = options.out or Path(__file__).parent / "results" / f"guidance-study-{today}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([f"# Guidance study, {today}", "", *lines, ""]))
    print("\n".join(lines), f"\n{out}")


if __name__ == "__main__":
    main()

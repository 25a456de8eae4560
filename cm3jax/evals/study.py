"""What a small text+image model can do, measured: pictures from held-out captions, captions from held-out pictures.

Every figure stands beside the same figure of an untrained model and beside chance, and the instrument (the attribute
reader) is itself measured on the true pictures and on their reconstructions. A model that was trained with retrieved
documents is measured without them and with them.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from cm3jax.data.image_tokenizer import ImageTokenizer
from cm3jax.data.scenes.language import parse_caption
from cm3jax.evals.attributes import chance, read, score, wilson
from cm3jax.files import write_atomic
from cm3jax.generate.generator import Generator, Sample
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.tasks import Steering, Task, caption, text_to_image
from cm3jax.generate.text_image import TextImageModel
from cm3jax.losses import psnr
from cm3jax.models.reader import Reader
from cm3jax.retrieval.memory import Memory
from cm3jax.tokens.document import Document, Image, pictures, texts
from cm3jax.tokens.image import fit, to_float

RETRIEVED = "with retrieved documents"  # the trained model, where `trained` is the same one without
CAPTION_MARKS = 6  # of a prompt for a caption: `</s> <sentinel:0> <break> image </s> <sentinel:0>`, and `<eoss>`


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """How much is generated, and how.

    Attributes:
      documents: held-out documents; each gives one prompt and one picture.
      shown: how many of them the report shows.
      guidance: classifier-free guidance weight of text to image.
    """

    documents: int
    shown: int
    guidance: float
    image: SamplingConfig
    text: SamplingConfig
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Where from, and how many documents stand in front of a prompt."""

    memory: Memory
    documents: int


@dataclasses.dataclass(frozen=True)
class Models:
    """What is studied: trained and untrained decoder over one image tokenizer, and the reader if there is truth.

    `retrieval` is that of the trained decoder, if it was trained with retrieved documents.
    """

    trained: TextImageModel
    untrained: TextImageModel
    image_tokenizer: ImageTokenizer
    reader: Reader | None
    retrieval: Retrieval | None = None


def study(models: Models, documents: Sequence[Document], config: StudyConfig, folder: Path) -> dict[str, Any]:
    """Generates, reads, scores; writes `pictures.npz` and `texts.json` for the report into `folder`.

    Returns:
      `psnr_of_mean_picture` in dB, and with a reader `attributes`: for each row of the report the accuracies by name,
      their mean, and the mean's 95 % interval over all answers.
    """
    size = models.image_tokenizer.config.resolution
    captions = [texts(document)[0] for document in documents]
    originals = np.stack([fit(pictures(document)[0], size) for document in documents])
    seeds = [config.seed + i for i in range(len(documents))]
    codes = models.image_tokenizer.encode(originals)
    reconstructions = models.image_tokenizer.decode(codes)
    drawn, written = {}, {}
    for name, model in (("trained", models.trained), ("untrained", models.untrained)):
        drawn[name] = model.images(captions, config.image, guidance=config.guidance, seeds=seeds)
        written[name] = model.captions(codes, config.text, seeds=seeds)
    if models.retrieval is not None:
        segments = [Image(pixels, row) for pixels, row in zip(originals, codes, strict=True)]
        drawn[RETRIEVED], written[RETRIEVED] = _with_retrieved(models, models.retrieval, captions, segments, config)
    shown = config.shown
    kept: dict[str, Any] = {"originals": originals, "reconstructions": reconstructions} | drawn
    np.savez_compressed(folder / "pictures.npz", **{name: images[:shown] for name, images in kept.items()})
    shown_texts = {"captions": captions[:shown], **{name: lines[:shown] for name, lines in written.items()}}
    write_atomic(folder / "texts.json", json.dumps(shown_texts, indent=2).encode())
    average = np.broadcast_to(originals.mean(axis=0).round().astype(np.uint8), originals.shape)
    numbers: dict[str, Any] = {"psnr_of_mean_picture": _mean_psnr(average, originals)}
    if models.reader is None:
        return numbers
    wanted = [document.meta["attributes"] for document in documents]
    seen = {"true pictures": originals, "reconstructions": reconstructions}
    seen |= {f"text to image, {name}": images for name, images in drawn.items()}
    told = {name: read(models.reader, list(images)) for name, images in seen.items()}
    told |= {f"caption, {name}": [parse_caption(line) for line in lines] for name, lines in written.items()}
    answers = sum(len(attributes) for attributes in wanted)
    numbers["attributes"] = {"chance": chance(models.reader.config.attributes)}
    for name, attributes in told.items():
        shares = score(attributes, wanted)
        interval = wilson(round(shares["mean"] * answers), answers)
        numbers["attributes"][name] = shares | {"interval": interval}
    return numbers


def _with_retrieved(
    models: Models, retrieval: Retrieval, captions: Sequence[str], images: Sequence[Image], config: StudyConfig
) -> tuple[UInt8[np.ndarray, "N H W 3"], list[str]]:
    """A picture for each caption and a caption for each image, with what is retrieved by it in front."""
    generator = Generator(models.trained, memory=retrieval.memory)
    # Each document has its share of the model's length; what a caption might need beyond its own, it would take from
    # the room of the retrieved ones.
    share = models.trained.config.max_len // (1 + retrieval.documents)
    max_text = share - models.image_tokenizer.image_tokens - CAPTION_MARKS
    settings: dict[str, Any] = {"image": config.image, "text": config.text, "max_text": max_text}
    settings |= {"retrieve": retrieval.documents}
    tasks = [
        Task(text_to_image(text), config.seed + i, Steering(config.guidance), **settings)
        for i, text in enumerate(captions)
    ]
    tasks += [Task(caption(image), config.seed + i, **settings) for i, image in enumerate(images)]
    samples = [_done(found[0]) for found in generator.complete(tasks)]
    drawn = [pictures(document)[-1] for document in samples[: len(captions)]]
    return np.stack(drawn), [texts(document)[0] for document in samples[len(captions) :]]


def _done(sample: Sample) -> Document:
    """Raises a ValueError if it was not."""
    if sample.document is None:
        raise ValueError(f"generate: {sample.error}")
    return sample.document


def _mean_psnr(images: UInt8[np.ndarray, "N H W 3"], originals: UInt8[np.ndarray, "N H W 3"]) -> float:
    return float(jnp.mean(psnr(jnp.asarray(to_float(images)), jnp.asarray(to_float(originals)))))

"""What a small text+image model can do, measured: pictures from held-out captions, captions from held-out pictures.

Every figure stands beside the same figure of an untrained model and beside chance, and the instrument (the attribute
reader) is itself measured on the true pictures and on their reconstructions.
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
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.text_image import TextImageModel
from cm3jax.losses import psnr
from cm3jax.models.reader import Reader
from cm3jax.tokens.document import Document, pictures, texts
from cm3jax.tokens.image import fit, to_float


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
class Models:
    """What is studied: trained and untrained decoder over one image tokenizer, and the reader if there is truth."""

    trained: TextImageModel
    untrained: TextImageModel
    image_tokenizer: ImageTokenizer
    reader: Reader | None


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
    shown = config.shown
    np.savez_compressed(
        folder / "pictures.npz",
        originals=originals[:shown],
        reconstructions=reconstructions[:shown],
        trained=drawn["trained"][:shown],
        untrained=drawn["untrained"][:shown],
    )
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


def _mean_psnr(images: UInt8[np.ndarray, "N H W 3"], originals: UInt8[np.ndarray, "N H W 3"]) -> float:
    return float(jnp.mean(psnr(jnp.asarray(to_float(images)), jnp.asarray(to_float(originals)))))

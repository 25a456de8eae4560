"""The scenes as a TFDS data set, ArrayRecord on disk, built and read without TensorFlow."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from cm3jax.data.scenes.drawing import draw
from cm3jax.data.scenes.edits import sample_edit
from cm3jax.data.scenes.language import long_caption, short_caption
from cm3jax.data.scenes.questions import questions
from cm3jax.data.scenes.render import render
from cm3jax.data.scenes.shapes import CLASSES
from cm3jax.data.scenes.space import ATTRIBUTES, Split, sample
from cm3jax.data.scenes.truth import truth


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
    """How many pictures of which size.

    Attributes:
      size: side of the pictures, pixels.
      train: examples of the split "train".
      valid: examples of the split "valid".
      seed: other seeds give other scenes.
      truth: whether to store segmentation, depth, edges, boxes, questions and an edit with each picture.
    """

    size: int = 64
    train: int = 20_000
    valid: int = 1_000
    seed: int = 0
    truth: bool = False


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Drawn scenes with captions that state every attribute; "valid" holds combinations that "train" never shows.

    `Scenes(config=ScenesConfig(name=..., size=...), data_dir=...)` builds other sizes and numbers; a config's name is
    part of the path, so other values need another name.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First drawing."}
    BUILDER_CONFIGS = [
        ScenesConfig(name="pictures64", size=64),
        ScenesConfig(name="pictures256", size=256),
        ScenesConfig(name="truth64", size=64, train=5_000, truth=True),
        ScenesConfig(name="truth256", size=256, train=5_000, truth=True),
    ]
    builder_config: ScenesConfig
    # TFDS would look this up through importlib_resources, which it imports but does not install.
    code_path = epath.Path(__file__)

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        text = tfds.features.Text()
        features: dict[str, Any] = {
            "id": text,
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "caption": text,
            "long_caption": text,
            "attributes": dict.fromkeys(ATTRIBUTES, text),
        }
        if self.builder_config.truth:
            plane = tfds.features.Image(shape=(size, size, 1), encoding_format="png")
            features |= {
                "segmentation": plane,
                "depth": plane,
                "edges": plane,
                "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
                "questions": tfds.features.Sequence({"kind": text, "question": text, "answer": text}),
                "edit": {
                    "attribute": text,
                    "instruction": text,
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                },
            }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Drawn scenes. Segmentation classes: {', '.join(CLASSES)}.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.train),
            "valid": self._generate_examples("valid", config.valid),
        }

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(count):
            example = _picture(config, split, index)
            yield index, example | _known(config, split, index) if config.truth else example


def _picture(config: ScenesConfig, split: Split, index: int) -> dict[str, Any]:
    scene = sample(config.seed, split, index)
    return {
        "id": f"scenes/{split}/{config.seed}/{index}",
        "image": _png(render(scene, config.size)),
        "caption": short_caption(scene),
        "long_caption": long_caption(scene),
        "attributes": scene.attributes,
    }


def _known(config: ScenesConfig, split: Split, index: int) -> dict[str, Any]:
    edit = sample_edit(config.seed, split, index)
    maps = truth(draw(edit.before), config.size)
    boxes = [tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1) for x0, y0, x1, y1 in maps.boxes.tolist()]
    return {
        "segmentation": _png(maps.segmentation),
        "depth": _png(maps.depth),
        "edges": _png(maps.edges),
        "boxes": boxes,
        "questions": [dataclasses.asdict(question) for question in questions(edit.before)],
        "edit": {
            "attribute": edit.attribute,
            "instruction": edit.instruction,
            "image": _png(render(edit.after, config.size)),
        },
    }


def _png(pixels: UInt8[np.ndarray, "S S *channels"]) -> bytes:
    # Encoded here: a feature given an array would call TensorFlow to encode it.
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

"""Any TFDS dataset with a picture and a text or label, read without TensorFlow."""

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from cm3jax.data.sources.reading import caption_of, listing_fingerprint, pixels_of, text_of
from cm3jax.data.sources.source import check_index
from cm3jax.tokens.document import Document, Image, Text
from cm3jax.tokens.image import MAX_PIXELS


class TfdsSource:
    """Documents (text, image) of a prepared dataset in a random-access format (`file_format="array_record"`).

    Labels are written as their names. Ids are the split's name and the index.
    """

    name = "tfds"

    def __init__(
        self,
        dataset: str | pathlib.Path,
        split: str = "train",
        image_key: str | None = None,
        text_key: str | None = None,
        data_dir: str | pathlib.Path | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        """`dataset`: a prepared dataset's directory (the one with `dataset_info.json`), or a name found in `data_dir`.

        Without keys, the image feature "image" or else the first by name is taken, and the text feature "caption" or
        "text", else the first text or, where there is none, the first label.

        Raises:
          FileNotFoundError: no such dataset, or it is not prepared.
          ValueError: no such split or feature, or a format without random access.
        """
        builder = _builder(dataset, data_dir)
        features = dict(sorted(builder.info.features.items()))  # stored metadata keeps no order
        if split.partition("[")[0] not in builder.info.splits:
            raise ValueError(f"tfds {dataset}: no split {split!r}, found {', '.join(builder.info.splits)}")
        kinds = tfds.features
        self._image_key = image_key or _choose(dataset, features, ("image",), kinds.Image)
        self._text_key = text_key or _choose(dataset, features, ("caption", "text"), kinds.Text, kinds.ClassLabel)
        for key, allowed in ((self._image_key, kinds.Image), (self._text_key, kinds.Text | kinds.ClassLabel)):
            if not isinstance(features.get(key), allowed):
                raise ValueError(f"tfds {dataset}: feature {key!r} cannot be used, found {_list(features)}")
        text = features[self._text_key]
        self._label_names = text.names if isinstance(text, kinds.ClassLabel) else None
        encoded = {key: tfds.decode.SkipDecoding() for key, kind in features.items() if isinstance(kind, kinds.Image)}
        try:
            self._data = builder.as_data_source(split=split, decoders=encoded)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"tfds {dataset}: {error}") from error
        self._split = split
        self._identity = f"{builder.info.full_name} {split}"
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        key = f"{self._split}/{index}"
        example = self._data[index]
        what = f"{self._identity}, example {index}"
        caption = caption_of(self._text(example[self._text_key], what, key), what, key)
        pixels = pixels_of(example[self._image_key], what, key, self._max_pixels)
        return Document((Text(caption), Image(pixels=pixels)), id=key)

    def _text(self, value: Any, what: str, key: str) -> str:
        return text_of(value, what, key) if self._label_names is None else self._label_names[value]

    def fingerprint(self) -> str:
        return listing_fingerprint(
            self.name,
            [(self._identity, len(self))],
            image_key=self._image_key,
            text_key=self._text_key,
            max_pixels=self._max_pixels,
        )


def _builder(dataset: str | pathlib.Path, data_dir: str | pathlib.Path | None) -> tfds.core.DatasetBuilder:
    directory = pathlib.Path(dataset)
    if (directory / "dataset_info.json").is_file():
        return tfds.builder_from_directory(str(directory))
    try:
        builder = tfds.builder(str(dataset), data_dir=None if data_dir is None else str(data_dir))
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"tfds: no dataset {dataset} ({error})") from error
    if not builder.is_prepared():
        raise FileNotFoundError(f"tfds: {dataset} is not prepared in {builder.data_dir}")
    return builder


def _choose(dataset: Any, features: dict[str, Any], preferred: tuple[str, ...], *kinds: type) -> str:
    for kind in kinds:
        for key in (*preferred, *features):
            if isinstance(features.get(key), kind):
                return key
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(f"tfds {dataset}: no {wanted} feature, found {_list(features)}")


def _list(features: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {type(feature).__name__}" for key, feature in features.items())

"""A trained dual encoder as functions on documents: parts encoded apart, each of length 1, averaged."""

import functools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int32, UInt8

from cm3jax.config import ConfigError, build, fingerprint
from cm3jax.data.image_tokenizer import weights_fingerprint
from cm3jax.models.clip import CLIP, normalised, with_params
from cm3jax.models.clip_config import PRESETS, CLIPConfig
from cm3jax.models.clip_weights import load_clip
from cm3jax.parallel.specs import batch_sharding
from cm3jax.reliability.checkpoint import load_params, read_run_config
from cm3jax.tokens.captions import CaptionTokenizer, load_caption_tokenizer
from cm3jax.tokens.document import Document, pictures, texts
from cm3jax.tokens.image import fit, to_float

logger = logging.getLogger(__name__)


class DocumentEncoder:
    """Pictures and texts to features of length 1, in batches of one size, split over the devices of a mesh.

    Attributes:
      fingerprint: of all that decides on a feature.
    """

    def __init__(
        self,
        config: CLIPConfig,
        params: Any,
        tokenizer: CaptionTokenizer,
        mesh: jax.sharding.Mesh,
        batch_size: int = 256,
    ):
        """`batch_size` is a multiple of the devices of `mesh`, all of which are of this process.

        Raises:
          ValueError: it is not.
        """
        if batch_size % mesh.size:
            raise ValueError(f"encoder: batch_size {batch_size} is not a multiple of the {mesh.size} devices")
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.fingerprint = fingerprint([config, weights_fingerprint(params), tokenizer.fingerprint])
        self._rows = batch_sharding(mesh)
        self._params = jax.device_put(params, NamedSharding(mesh, P()))

        @jax.jit
        def encode_images(params: Any, images: jax.Array, kept: jax.Array) -> jax.Array:
            return normalised(_model(config, params).encode_images(to_float(images), kept))

        @jax.jit
        def encode_texts(params: Any, rows: jax.Array) -> jax.Array:
            return normalised(_model(config, params).encode_texts(rows))

        self._encode_images, self._encode_texts = encode_images, encode_texts

    def images(
        self, pixels: UInt8[np.ndarray, "B S S 3"], kept: Int32[np.ndarray, "B K"] | None = None
    ) -> Float32[np.ndarray, "B E"]:
        """Features of pictures of the encoder's size, or of the patches `kept` of each."""
        if kept is None:
            kept = np.tile(np.arange(self.config.patches, dtype=np.int32), (len(pixels), 1))
        return self._in_batches(functools.partial(self._encode_images, self._params), pixels, kept)

    def texts(self, rows: Int32[np.ndarray, "B context"]) -> Float32[np.ndarray, "B E"]:
        """Features of rows of `tokenizer`."""
        return self._in_batches(functools.partial(self._encode_texts, self._params), rows)

    def inputs(self, document: Document) -> tuple[list[int], UInt8[np.ndarray, "S S 3"] | None]:
        """What is encoded of a document: ids of its texts, joined by spaces; its first picture, None without one."""
        seen = pictures(document)
        return self.tokenizer.ids(" ".join(texts(document))), fit(seen[0], self.config.image_size) if seen else None

    def parts(self, documents: Sequence[Document]) -> tuple[Float32[np.ndarray, "B E"], Float32[np.ndarray, "B E"]]:
        """Features of the documents' pictures and of their texts, whole; 0 where a document has none."""
        images, texts = (np.zeros((len(documents), self.config.embed_dim), np.float32) for _ in range(2))
        inputs = [self.inputs(document) for document in documents]
        shown = {place: pixels for place, (_, pixels) in enumerate(inputs) if pixels is not None}
        said = {place: self.tokenizer.row(ids) for place, (ids, _) in enumerate(inputs) if ids}
        if shown:
            images[list(shown)] = self.images(np.stack(list(shown.values())))
        if said:
            texts[list(said)] = self.texts(np.stack(list(said.values())))
        return images, texts

    def _in_batches(self, function: Any, *columns: np.ndarray) -> Float32[np.ndarray, "B E"]:
        size, count = self.batch_size, len(columns[0])
        results = [np.zeros((0, self.config.embed_dim), np.float32)]
        for start in range(0, count, size):
            parts = [column[start : start + size] for column in columns]
            filled = [np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]) for part in parts]
            found = function(*(jax.device_put(part, self._rows) for part in filled))
            results.append(np.asarray(found)[: len(parts[0])])
        return np.concatenate(results)


def averaged(parts: Sequence[Float32[np.ndarray, "B E"]]) -> Float32[np.ndarray, "B E"]:
    """The mean of the parts' features (RA-CM3, arXiv 2211.12561, section 3.1), of length 1; absent parts are 0."""
    total = np.sum(parts, axis=0)
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def load_encoder(
    path: str | pathlib.Path,
    mesh: jax.sharding.Mesh,
    *,
    size: str | None = None,
    tokenizer: str | None = None,
    batch_size: int = 256,
) -> DocumentEncoder:
    """The newest checkpoint of a `clip` run, or a file of released weights.

    Args:
      size, tokenizer: of a file: a name in `models.clip_config.PRESETS`, and CLIP's merges. A run knows its own.

    Raises:
      ConfigError: the run is of another task, or a file comes without size or tokenizer.
      ValueError, FileNotFoundError: as `models.clip_weights.load_clip`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        values = read_run_config(path)
        if values["task"] != "clip":
            raise ConfigError(f"{path} is a run of task {values['task']!r}, expected 'clip'")
        config = build(CLIPConfig, values["clip"]["model"], "clip.model.")
        tokenizer = tokenizer or values["clip"]["tokenizer"]
        step, params = load_params(path / "checkpoints")
        logger.info("encoder: %s, step %d", path, step)
    else:
        if size not in PRESETS or tokenizer is None:
            raise ConfigError(f"{path}: weights need a size of {', '.join(PRESETS)}, found {size!r}, and a tokenizer")
        config = PRESETS[size]
        params = load_clip(path, config)
    return DocumentEncoder(config, params, load_caption_tokenizer(tokenizer, config.context), mesh, batch_size)


def _model(config: CLIPConfig, params: Any) -> CLIP:
    return with_params(config, jax.tree.map(jnp.asarray, params))

"""A trained VQGAN as a pair of functions on uint8 pictures: what tokenising and generating need of it."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int, UInt8

from cm3jax.config import ConfigError, build
from cm3jax.models.vqgan import VQGAN, VQGANConfig
from cm3jax.reliability.checkpoint import load_params, read_run_config
from cm3jax.tokens.image import to_float, to_uint8

logger = logging.getLogger(__name__)


class ImageTokenizer:
    """Pixels to codes and back, in batches of fixed sizes so that little is compiled.

    Codes are always made in whole batches, so that they do not depend on how many pictures come at a time; pictures
    are also made few at a time, as generation does.
    """

    def __init__(self, config: VQGANConfig, params: dict, fingerprint: str, batch_size: int = 32):
        """`fingerprint` stands for the weights; records carry it."""
        self.config = config
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: VQGAN(config, nnx.Rngs(0))))
        self._params = params
        self._encode = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode_codes(x))
        self._decode = jax.jit(lambda p, c: nnx.merge(graphdef, p).decode_codes(c))

    @property
    def image_tokens(self) -> int:
        """Codes per picture."""
        return self.config.tokens

    def encode(self, images: UInt8[np.ndarray, "B H W 3"]) -> Int[np.ndarray, "B N"]:
        """Codes in raster order.

        Raises:
          ValueError: the pictures are not of the tokenizer's resolution.
        """
        expected = (self.config.resolution, self.config.resolution, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"images of shape {images.shape[1:]}, the image tokenizer takes {expected}")
        return _in_batches(lambda x: self._encode(self._params, jnp.asarray(to_float(x))), images, self.batch_size)

    def decode(self, codes: Int[np.ndarray, "B N"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Pictures of the tokenizer's resolution.

        Raises:
          ValueError: a code is out of range, or a row has not `image_tokens` codes.
        """
        if codes.ndim != 2 or codes.shape[1] != self.image_tokens:
            raise ValueError(f"codes of shape {codes.shape}, expected [B, {self.image_tokens}]")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.config.codes:
            raise ValueError(f"codes in [{codes.min()}, {codes.max()}], expected [0, {self.config.codes})")
        size = min(self.batch_size, 1 << max(len(codes) - 1, 0).bit_length())
        return to_uint8(_in_batches(lambda c: self._decode(self._params, jnp.asarray(c)), codes, size))


def _in_batches(function: Callable[[np.ndarray], jax.Array], rows: np.ndarray, size: int) -> np.ndarray:
    """`function` of `size` rows at a time; the last batch is filled up with its last row."""
    results = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
        results.append(np.asarray(function(padded))[: len(chunk)])
    return np.concatenate(results)


def load_image_tokenizer(run: Path, step: int | None = None) -> ImageTokenizer:
    """The averaged (EMA) generator of a `vqgan` run.

    Raises:
      ConfigError: the run is of another task.
    """
    config = read_run_config(run)
    if config["task"] != "vqgan":
        raise ConfigError(f"{run} is a run of task {config['task']!r}, expected 'vqgan'")
    step, params = load_params(Path(run) / "checkpoints", "ema", step)
    logger.info("image tokenizer: %s, step %d", run, step)
    return ImageTokenizer(
        build(VQGANConfig, config["vqgan"]["model"], "vqgan.model."), params, weights_fingerprint(params)
    )


def weights_fingerprint(params: Any) -> str:
    """Sixteen hex digits of the weights' bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]

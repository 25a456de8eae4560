"""Captions and pictures in, pictures and captions out: a decoder run with its two tokenizers."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int, UInt8

from cm3jax.config import ConfigError, build
from cm3jax.data.image_tokenizer import ImageTokenizer, load_image_tokenizer
from cm3jax.data.records import read_manifest
from cm3jax.generate import prompts
from cm3jax.generate.engine import USUAL, Engine, EngineConfig
from cm3jax.generate.guidance import Guidance, classifier_free
from cm3jax.generate.request import Completion, Request
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.models.config import TransformerConfig
from cm3jax.models.transformer import Transformer
from cm3jax.reliability.checkpoint import load_params, read_run_config
from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

LONGEST_CAPTION = 64  # ids


@dataclasses.dataclass(frozen=True, eq=False)
class TextImageModel:
    """A decoder and what turns its ids into text and pictures."""

    config: TransformerConfig
    params: Any
    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer

    @classmethod
    def load(cls, run: Path, step: int | None = None) -> "TextImageModel":
        """The newest checkpoint (or `step`) of an `lm` run, with the tokenizers that its configuration names.

        Raises:
          ConfigError: a run of another task, or tokenizers that are not those of its records.
          CheckpointError: no such run or checkpoint.
        """
        config = read_run_config(run)
        if config["task"] != "lm":
            raise ConfigError(f"{run} is a run of task {config['task']!r}, expected 'lm'")
        lm = config["lm"]
        manifest = read_manifest(Path(lm["train"][0]["path"]))
        text, images = TextTokenizer.load(lm["text_tokenizer"]), load_image_tokenizer(Path(lm["image_tokenizer"]))
        for kind, found, expected in (
            ("text", text.fingerprint, manifest.text_tokenizer),
            ("image", images.fingerprint, manifest.image_tokenizer),
        ):
            if found != expected:
                raise ConfigError(f"{run}: its {kind} tokenizer is now {found}, its records were made with {expected}")
        step, params = load_params(Path(run) / "checkpoints", step=step)
        logger.info("decoder: %s, step %d", run, step)
        model = build(TransformerConfig, lm["model"], "lm.model.")
        return cls(model, params, manifest.vocabulary, text, images)

    def untrained(self, seed: int = 0) -> "TextImageModel":
        """The same with freshly drawn decoder weights: what a figure of the trained one is compared with."""
        params = nnx.to_pure_dict(nnx.state(Transformer(self.config, nnx.Rngs(seed))))
        return dataclasses.replace(self, params=params)

    def images(
        self, captions: Sequence[str], sampling: SamplingConfig, guidance: float, seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """One picture for each caption.

        Args:
          guidance: classifier-free guidance weight; 1 is none.

        Raises:
          ValueError: an empty or too long caption, or unequal numbers of captions and seeds.
        """
        free = guidance == 1.0
        unconditional = () if free else (tuple(prompts.unconditional_image(self.vocabulary)),)
        requests = [
            Request(
                streams=(tuple(prompts.text_to_image(self.vocabulary, self._ids(caption))), *unconditional),
                produce="image",
                seed=seed,
                image=sampling,
                guidance=Guidance() if free else classifier_free(guidance),
            )
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        codes = [self.vocabulary.image_code(np.array(done.ids)) for done in _all_good(self.engine.run(requests))]
        return self.image_tokenizer.decode(np.reshape(codes, (-1, self.image_tokenizer.image_tokens)).astype(np.int32))

    def fits(self, caption: str) -> bool:
        """Whether a picture can be drawn from this caption within the decoder's length."""
        prompt = prompts.text_to_image(self.vocabulary, self._ids(caption))
        return len(prompt) + self.image_tokenizer.image_tokens <= self.config.max_len

    def captions(
        self, codes: Int[np.ndarray, "N image_tokens"], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[str]:
        """One caption for each picture, given as its codes: the infill of a masked text, as in pre-training."""
        requests = [self._caption_request(row, sampling, seed) for row, seed in zip(codes.tolist(), seeds, strict=True)]
        return [self.text_tokenizer.decode(done.ids) for done in _all_good(self.engine.run(requests))]

    def _caption_request(self, codes: Sequence[int], sampling: SamplingConfig, seed: int) -> Request:
        prompt = tuple(prompts.caption(self.vocabulary, codes))
        room = self.config.max_len - len(prompt)
        return Request((prompt,), "text", seed, max_new=min(LONGEST_CAPTION, room), text=sampling)

    def _ids(self, text: str) -> list[int]:
        ids = self.text_tokenizer.encode(text)
        if not ids:
            raise ValueError("empty caption: text to image needs at least one character")
        return ids

    @functools.cached_property
    def engine(self) -> Engine:
        """What decodes for this model, on one device."""
        return self.make_engine()

    def make_engine(self, config: EngineConfig = USUAL, mesh: jax.sharding.Mesh | None = None) -> Engine:
        """An engine of these weights; on the first device where no mesh is given."""
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Transformer(self.config, nnx.Rngs(0))))
        tokens, pieces = self.image_tokenizer.image_tokens, self.text_tokenizer.size
        return Engine(graphdef, self.params, self.vocabulary, tokens, pieces, config, mesh)


def _all_good(completions: Sequence[Completion]) -> Sequence[Completion]:
    for completion in completions:
        if completion.error is not None:
            raise ValueError(f"generate: {completion.error}")
    return completions

"""Task `clip`: trains the dual encoder that retrieval embeds documents with."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm3jax.config import ConfigError, fingerprint
from cm3jax.data.loader import device_batches
from cm3jax.data.pairs import PairExamples
from cm3jax.data.sources.open import open_source
from cm3jax.models.clip import CLIP, normalised
from cm3jax.models.clip_config import CLIPConfig
from cm3jax.models.contrastive import chance_recall, recall, sigmoid_loss, softmax_loss
from cm3jax.optim import OptimConfig
from cm3jax.parallel.specs import batch_sharding, replicated
from cm3jax.perf.traced import forward_flops
from cm3jax.reliability.anomaly import AnomalyConfig
from cm3jax.state import TrainState
from cm3jax.tasks.network import Network
from cm3jax.tasks.task import Batch, Metrics
from cm3jax.tokens.captions import CaptionTokenizer, load_caption_tokenizer
from cm3jax.tokens.image import to_float

RECALLS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class CLIPTaskConfig:
    """Encoder, data and optimizer of a run. The loss is sigmoid where the model has a bias, else softmax.

    Attributes:
      tokenizer: as `tokens.captions.load_caption_tokenizer` takes.
      source, valid: as `data.sources.open.open_source` takes; without `valid`, a share of `source` is held out.
      batch_size: pairs in a global batch; each is compared with all others of it.
      valid_pairs: how many validation pairs are ranked, at most.
    """

    model: CLIPConfig
    tokenizer: str
    source: str
    valid: str | None = None
    optim: OptimConfig = OptimConfig(
        learning_rate=5e-4, warmup_steps=2000, decay="cosine", final_ratio=0.0, b2=0.98, eps=1e-6, weight_decay=0.2
    )
    anomaly: AnomalyConfig = AnomalyConfig()
    batch_size: int = 1024
    keep_pictures: bool = True
    valid_pairs: int = 1000


class CLIPTask:
    """Implements `tasks.task.Task`."""

    unit = "pairs"

    def __init__(self, config: CLIPTaskConfig, *, seed: int, steps: int):
        self.config, self.seed = config, seed
        self.batch_size = self.units_per_batch = config.batch_size
        self._network = Network(lambda rngs: CLIP(config.model, rngs), config.optim, config.anomaly, steps)
        self.init, self.state_specs = self._network.init, self._network.state_specs
        self._features = jax.jit(lambda params, batch: replicated(self._encode(self._network.merge(params), batch)))
        # Backward: once more for the weights and once more for the activations.
        self.flops_per_batch = 3.0 * forward_flops(self._loss, self._network.abstract, self.batch_shapes())

    @functools.cached_property
    def examples(self) -> PairExamples:
        """The training pairs; opens their source."""
        return self._pairs(self.config.source, "train", self.seed)

    @functools.cached_property
    def _validation(self) -> PairExamples:
        return self._pairs(self.config.valid or self.config.source, "valid", 0)

    @functools.cached_property
    def _tokenizer(self) -> CaptionTokenizer:
        model = self.config.model
        tokenizer = load_caption_tokenizer(self.config.tokenizer, model.context)
        if tokenizer.size > model.vocab_size or tokenizer.end != model.end_id:
            raise ConfigError(
                f"{self.config.tokenizer} has {tokenizer.size} ids and the end {tokenizer.end}, "
                f"clip.model has vocab_size {model.vocab_size} and end_id {model.end_id}"
            )
        return tokenizer

    def _pairs(self, spec: str, split: Any, seed: int) -> PairExamples:
        source = open_source(spec, split=split)
        return PairExamples(source, self._tokenizer, self.config.model.image_size, seed, self.config.keep_pictures)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        side, context = self.config.model.image_size, self.config.model.context
        return {
            "image": jax.ShapeDtypeStruct((self.batch_size, side, side, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((self.batch_size, context), jnp.int32),
        }

    def data_fingerprint(self) -> str:
        return fingerprint([self.examples.fingerprint, self.batch_size])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update; every pair of the global batch is told from all others."""
        loss, grads = jax.value_and_grad(self._loss)(state.params, batch)
        scale = self._network.merge(state.params).scale()
        state, metrics = self._network.update(state, grads, loss)
        return state, {"loss": loss, "scale": scale} | metrics

    def _loss(self, params: Any, batch: Batch) -> Float[Array, ""]:
        model = self._network.merge(params)
        features = self._encode(model, batch)
        if model.logit_bias is None:
            return softmax_loss(features["image"], features["text"], model.scale())
        return sigmoid_loss(features["image"], features["text"], model.scale(), model.logit_bias[...])

    def _encode(self, model: CLIP, batch: Batch) -> dict[str, Float[Array, "B E"]]:
        """Features of length 1."""
        return {
            "image": normalised(model.encode_images(to_float(batch["image"]))),
            "text": normalised(model.encode_texts(batch["text"])),
        }

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Recall at 1, 5 and 10 of a picture by each caption and of a caption by each picture, and by chance.

        Ranked are the different pictures and the different captions of the validation pairs; right is what is a pair.
        """
        pairs = min(self.config.valid_pairs, len(self._validation.source))
        steps, rows = -(-pairs // self.batch_size), batch_sharding(jax.sharding.get_mesh())
        batches = device_batches(self._validation, self.batch_size, 0, steps, rows)
        found = [jax.device_get(self._features(state.params, batch)) for batch in batches]
        examples = [self._validation[i] for i in range(pairs)]
        features, members = {}, {}
        for name in ("image", "text"):
            _, first, members[name] = np.unique(
                [example[name].tobytes() for example in examples], return_index=True, return_inverse=True
            )
            features[name] = np.concatenate([batch[name] for batch in found])[first]
        right = np.zeros((len(features["text"]), len(features["image"])), np.float32)
        right[members["text"], members["image"]] = 1
        return _recalls("text_to_image", features["text"], features["image"], right) | _recalls(
            "image_to_text", features["image"], features["text"], right.T
        )


def _recalls(
    name: str, queries: Float[np.ndarray, "Q E"], targets: Float[np.ndarray, "N E"], right: Float[np.ndarray, "Q N"]
) -> dict[str, float]:
    numbers = {}
    for k in RECALLS:
        taken = min(k, len(targets))
        numbers[f"{name}_recall_{k}"] = recall(queries, targets, right, taken)
        numbers[f"{name}_chance_{k}"] = chance_recall(right, taken)
    return numbers

"""Task `lm`: next-token training on CM3-transformed sequences, for pre-training and for fine-tuning alike."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cm3jax.config import ConfigError, fingerprint
from cm3jax.data.cm3 import CM3Config
from cm3jax.data.loader import batches
from cm3jax.data.mixture import Mixture
from cm3jax.data.plan import PlanConfig
from cm3jax.data.plans import Plans
from cm3jax.data.records import Records
from cm3jax.data.sequences import Sequences
from cm3jax.kernels.cross_entropy import cross_entropy
from cm3jax.models.config import TransformerConfig
from cm3jax.models.transformer import Transformer
from cm3jax.optim import OptimConfig
from cm3jax.perf.flops import flops_per_token
from cm3jax.state import TrainState
from cm3jax.tasks.network import Network
from cm3jax.tasks.task import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A folder of records and how often each record appears per epoch."""

    path: str
    repeat: float = 1.0


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Decoder, data and optimizer of a run.

    Attributes:
      image_tokenizer: the `vqgan` run whose codes the records hold; read when generating.
      text_tokenizer: the text model of the records; read when generating.
      batch_size: sequences in a global batch.
      accumulate: microbatches per update.
      loss_chunk: tokens whose logits are held at once.
      valid_batches: at most so many batches are evaluated.
    """

    model: TransformerConfig
    train: tuple[DatasetConfig, ...]
    valid: tuple[DatasetConfig, ...]
    image_tokenizer: str
    text_tokenizer: str
    plan: PlanConfig
    cm3: CM3Config = CM3Config()
    optim: OptimConfig = OptimConfig()
    batch_size: int = 32
    accumulate: int = 1
    z_loss: float = 0.0
    loss_chunk: int = 1024
    valid_batches: int = 16

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.plan.length > self.model.max_len:
            raise ValueError(f"plan.length {self.plan.length} is more than model.max_len {self.model.max_len}")


class LMTask:
    """Implements `tasks.task.Task`."""

    unit = "tokens"

    def __init__(self, config: LMConfig, *, seed: int, steps: int):
        """Opens the records of `config`.

        Raises:
          ConfigError: the model's vocabulary is not that of the records.
        """
        self.config = config
        train = _mixture(config.train)
        self.vocabulary = train.vocabulary
        if config.model.vocab_size != self.vocabulary.size:
            raise ConfigError(f"lm.model.vocab_size is {config.model.vocab_size}, the records' {self.vocabulary.size}")
        self.examples = Sequences(Plans(train, config.plan, seed), config.cm3)
        causal = dataclasses.replace(config.plan, spans="causal")
        self._validation = Sequences(Plans(_mixture(config.valid), causal, 0), config.cm3)
        self.batch_size = config.batch_size
        self.units_per_batch = config.batch_size * config.plan.length
        self.flops_per_batch = self.units_per_batch * flops_per_token(config.model, config.plan.length)
        self._network = Network(lambda rngs: Transformer(config.model, rngs), config.optim, steps)
        self.init, self.state_specs = self._network.init, self._network.state_specs
        self._valid_step = jax.jit(self._losses)

    def data_fingerprint(self) -> str:
        return fingerprint([self.examples.fingerprint, self.batch_size])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update over `accumulate` microbatches; the loss is the mean over all tokens with weight."""
        count = self.config.accumulate
        total = jnp.maximum(batch["weights"][:, 1:].sum(), 1.0)

        def objective(params, rows):
            loss, sums = self._losses(params, rows)
            return loss / total, sums

        def accumulate(carry, rows):
            (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(state.params, rows)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        zeros = (jax.tree.map(jnp.zeros_like, state.params), {name: jnp.zeros(2) for name in MODALITIES})
        # Row r joins microbatch r % count, so that each device has its share of every microbatch.
        rows = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)
        (grads, sums), _ = jax.lax.scan(accumulate, zeros, rows)
        state, metrics = self._network.update(state, grads)
        return state, {name: value[0] / jnp.maximum(value[1], 1.0) for name, value in sums.items()} | metrics

    def _losses(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, " 2"]]]:
        """The weighted sum that is minimised, and (weighted sum of nats, weight) per modality."""
        model = self._network.merge(params)
        tokens, weights = batch["tokens"], batch["weights"][:, 1:]
        hidden, targets = model(tokens[:, :-1]), tokens[:, 1:]
        found = cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            model.unembedding(),
            targets.reshape(-1),
            weights.reshape(-1),
            z_loss=self.config.z_loss,
            chunk=self.config.loss_chunk,
        )
        nll = found.nll.reshape(targets.shape)
        masks = {"loss": weights, "text_loss": weights * self.vocabulary.is_text(targets)}
        masks["image_loss"] = weights * self.vocabulary.is_image(targets)
        return found.loss_sum, {name: jnp.stack([(nll * mask).sum(), mask.sum()]) for name, mask in masks.items()}

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Bits per token of causal validation sequences (text, `<break>`, image): all, text, image."""
        sequences = len(self._validation.plans.epoch(0))
        size = min(self.batch_size, sequences)
        steps = min(self.config.valid_batches, sequences // size)
        totals: dict[str, np.ndarray] = {}
        for batch in batches(self._validation, size, steps=steps):
            sums = jax.device_get(self._valid_step(state.params, batch)[1])
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        return {
            bits: float(totals[name][0] / max(totals[name][1], 1.0)) / math.log(2) for name, bits in MODALITIES.items()
        }


# Metric of the training step (nats) and its name at evaluation (bits).
MODALITIES = {"loss": "bits_per_token", "text_loss": "bits_per_text_token", "image_loss": "bits_per_image_token"}


def _mixture(datasets: tuple[DatasetConfig, ...]) -> Mixture:
    return Mixture([(Records(dataset.path), dataset.repeat) for dataset in datasets])

"""Task `lm`: next-token training on CM3-transformed sequences, for pre-training and for fine-tuning alike."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cm3jax.config import ConfigError, fingerprint
from cm3jax.data.loader import batches
from cm3jax.data.records import Records
from cm3jax.data.sequences import SequenceConfig, Sequences
from cm3jax.kernels.cross_entropy import cross_entropy
from cm3jax.models.config import TransformerConfig
from cm3jax.models.transformer import Transformer
from cm3jax.optim import OptimConfig, apply_gradients, decay_mask, fresh_state, make_optimizer, opt_state_specs
from cm3jax.parallel.specs import weight_specs
from cm3jax.perf.flops import flops_per_token
from cm3jax.state import TrainState
from cm3jax.tasks.task import Batch, Metrics
from cm3jax.tokens.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A folder of records and how often each record appears per epoch."""

    path: str
    repeat: float = 1.0


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Decoder, data and optimizer of a run. `batch_size` counts sequences over all devices."""

    model: TransformerConfig
    train: tuple[DatasetConfig, ...]
    valid: tuple[DatasetConfig, ...]
    sequences: SequenceConfig
    optim: OptimConfig = OptimConfig()
    batch_size: int = 32
    accumulate: int = 1
    z_loss: float = 0.0
    loss_chunk: int = 1024
    valid_batches: int = 16
    workers: int = 0

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.sequences.length > self.model.max_len:
            raise ValueError(f"sequences of {self.sequences.length} tokens, model.max_len is {self.model.max_len}")


class LMTask:
    """Implements `tasks.task.Task`."""

    unit = "tokens"

    def __init__(self, config: LMConfig, *, seed: int, steps: int):
        self.config, self.seed, self.steps = config, seed, steps
        self.train_records = [Records(Path(d.path)) for d in config.train]
        self.valid_records = [Records(Path(d.path)) for d in config.valid]
        self.vocabulary = _one_vocabulary([*self.train_records, *self.valid_records])
        if config.model.vocab_size != self.vocabulary.size:
            raise ConfigError(f"lm.model.vocab_size is {config.model.vocab_size}, the records' {self.vocabulary.size}")
        self.tokens_per_batch = config.batch_size * config.sequences.length
        self.flops_per_batch = self.tokens_per_batch * flops_per_token(config.model, config.sequences.length)
        self._graphdef, self._abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0))))
        self._optimizer = make_optimizer(config.optim, steps, decay_mask(self._abstract))
        self._sequences = Sequences(
            self.train_records, [d.repeat for d in config.train], config.sequences, self.vocabulary, seed
        )
        self._valid_step = jax.jit(self._losses)

    def init(self, key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(Transformer(self.config.model, nnx.Rngs(key))))
        return fresh_state(params, self._optimizer.init(params))

    def state_specs(self) -> TrainState:
        specs = weight_specs(self._abstract)
        moments = opt_state_specs(self._optimizer, nnx.to_pure_dict(self._abstract), specs)
        return TrainState(step=P(), params=specs, opt_state=moments, extra={}, skipped=P())

    def data_fingerprint(self) -> str:
        return fingerprint([self._sequences.fingerprint(), self.config.batch_size, self.seed])

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(
            self._sequences,
            batch_size=self.config.batch_size,
            start=start,
            steps=self.steps,
            workers=self.config.workers,
        )

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
        state, metrics = apply_gradients(self._optimizer, state, grads)
        return state, {name: value[0] / jnp.maximum(value[1], 1.0) for name, value in sums.items()} | metrics

    def _losses(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, " 2"]]]:
        """The weighted sum that is minimised, and (weighted sum of nats, weight) per modality."""
        model = nnx.merge(self._graphdef, params)
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
        causal = dataclasses.replace(
            self.config.sequences, cm3=dataclasses.replace(self.config.sequences.cm3, mode="causal")
        )
        sequences = Sequences(self.valid_records, [d.repeat for d in self.config.valid], causal, self.vocabulary, 0)
        size = min(self.config.batch_size, sequences.epoch_length(0))
        steps = min(self.config.valid_batches, sequences.epoch_length(0) // size)
        totals: dict[str, np.ndarray] = {}
        for batch in batches(sequences, batch_size=size, start=0, steps=steps):
            sums = jax.device_get(self._valid_step(state.params, batch)[1])
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        return {
            bits: float(totals[name][0] / max(totals[name][1], 1.0)) / math.log(2) for name, bits in MODALITIES.items()
        }


# Metric of the training step (nats) and its name at evaluation (bits).
MODALITIES = {"loss": "bits_per_token", "text_loss": "bits_per_text_token", "image_loss": "bits_per_image_token"}


def _one_vocabulary(records: list[Records]) -> Vocabulary:
    vocabularies = {r.vocabulary for r in records}
    if len(vocabularies) != 1:
        raise ConfigError(f"the records of one run need one vocabulary, found {sorted(map(str, vocabularies))}")
    return vocabularies.pop()

"""Task `lm`: next-token training on CM3-transformed sequences, for pre-training and for fine-tuning alike."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cm3jax.config import ConfigError, fingerprint
from cm3jax.data.cm3 import CM3Config
from cm3jax.data.loader import device_batches
from cm3jax.data.mixture import Mixture
from cm3jax.data.plan import PlanConfig
from cm3jax.data.plans import Plans
from cm3jax.data.records import Records
from cm3jax.data.sequences import CausalSequences, Sequences
from cm3jax.kernels.cross_entropy import cross_entropy
from cm3jax.models.config import TransformerConfig
from cm3jax.models.transformer import Transformer
from cm3jax.optim import OptimConfig
from cm3jax.parallel.specs import batch_sharding, constrain_as, replicated
from cm3jax.perf.flops import flops_per_token
from cm3jax.reliability.anomaly import AnomalyConfig
from cm3jax.retrieval.neighbours import DrawnNeighbours, NeighbourTable
from cm3jax.state import TrainState
from cm3jax.tasks.network import Network
from cm3jax.tasks.task import Batch, Metrics
from cm3jax.tokens.packed import samples_of
from cm3jax.tokens.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A folder of records and how often each record appears per epoch.

    Attributes:
      neighbours: a folder of their neighbour table; None if the documents of this set stand alone in their samples.
    """

    path: str
    repeat: float = 1.0
    neighbours: str | None = None


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Decoder, data and optimizer of a run.

    Attributes:
      image_tokenizer: the `vqgan` run whose codes the records hold; read when generating.
      text_tokenizer: the text model of the records; read when generating.
      isolate_samples: samples of a sequence do not see each other and positions restart in each, as if each were alone;
        the first token of a sample is then no target of the one before it.
      retrieved: documents in front of each query, at most; 0 trains without retrieval, tables or not.
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
    vocabulary: Vocabulary = Vocabulary()
    cm3: CM3Config = CM3Config()
    optim: OptimConfig = OptimConfig()
    anomaly: AnomalyConfig = AnomalyConfig()
    isolate_samples: bool = False
    retrieved: int = 0
    batch_size: int = 32
    accumulate: int = 1
    z_loss: float = 0.0
    loss_chunk: int = 1024
    valid_batches: int = 16

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.retrieved < 0:
            raise ValueError(f"retrieved {self.retrieved}, expected >= 0")
        if self.model.vocab_size != self.vocabulary.size:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} is not vocabulary.size {self.vocabulary.size}")
        if self.plan.length > self.model.max_len:
            raise ValueError(f"plan.length {self.plan.length} is more than model.max_len {self.model.max_len}")


class LMTask:
    """Implements `tasks.task.Task`."""

    unit = "tokens"

    def __init__(self, config: LMConfig, *, seed: int, steps: int):
        self.config, self.seed = config, seed
        self.vocabulary = config.vocabulary
        self.batch_size = config.batch_size
        self.units_per_batch = config.batch_size * config.plan.length
        self.flops_per_batch = self.units_per_batch * flops_per_token(config.model, config.plan.length)
        self._network = Network(lambda rngs: Transformer(config.model, rngs), config.optim, config.anomaly, steps)
        self.init, self.state_specs = self._network.init, self._network.state_specs
        self._valid_step = jax.jit(lambda params, batch: replicated(self._losses(params, batch)[1]))

    @functools.cached_property
    def examples(self) -> Sequences:
        """The training stream; opens the records.

        Raises:
          ConfigError: the records were made with another vocabulary.
          RetrievalError: a neighbour table does not belong to the records.
        """
        return Sequences(self._plans(self.config.train, self.config.plan, self.seed), self.config.cm3)

    @functools.cached_property
    def _validation(self) -> CausalSequences:
        causal = dataclasses.replace(self.config.plan, spans="causal")
        return CausalSequences(self._plans(self.config.valid, causal, 0), self.config.cm3)

    def _plans(self, datasets: tuple[DatasetConfig, ...], plan: PlanConfig, seed: int) -> Plans:
        parts = [Records(dataset.path) for dataset in datasets]
        mixture = Mixture([(part, dataset.repeat) for part, dataset in zip(parts, datasets, strict=True)])
        if mixture.vocabulary != self.vocabulary:
            raise ConfigError(f"lm.vocabulary is {self.vocabulary}, that of {datasets[0].path} {mixture.vocabulary}")
        return Plans(mixture, plan, seed, neighbours=self._neighbours(parts, datasets))

    def _neighbours(self, parts: list[Records], datasets: tuple[DatasetConfig, ...]) -> DrawnNeighbours | None:
        if not self.config.retrieved:
            return None
        tables = [None if d.neighbours is None else NeighbourTable(d.neighbours) for d in datasets]
        if all(table is None for table in tables):
            raise ConfigError(f"lm.retrieved is {self.config.retrieved}, but none of {datasets} names its neighbours")
        return DrawnNeighbours(parts, tables, self.config.retrieved)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.batch_size, self.config.plan.length + 1)
        return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "weights": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def data_fingerprint(self) -> str:
        return fingerprint([self.examples.fingerprint, self.batch_size])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update over `accumulate` microbatches; the loss is the mean over all tokens with weight."""
        count = self.config.accumulate
        total = jnp.maximum(self._target_weights(batch).sum(), 1.0)

        def objective(params, rows):
            loss, sums = self._losses(params, rows)
            return loss / total, sums

        gradients = jax.value_and_grad(objective, has_aux=True)

        def accumulate(carry, rows):
            (_, sums), grads = gradients(state.params, rows)
            grads, sums = jax.tree.map(jnp.add, carry, (grads, sums))
            return (constrain_as(grads, self._network.specs), sums), None

        if count == 1:
            (_, sums), grads = gradients(state.params, batch)
        else:
            zeros = (jax.tree.map(jnp.zeros_like, state.params), {name: jnp.zeros(2) for name in MODALITIES})
            # Row r joins microbatch r % count, so that each device has its share of every microbatch.
            rows = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, rows)
        grads = constrain_as(grads, self._network.specs)
        losses = {name: value[0] / jnp.maximum(value[1], 1.0) for name, value in sums.items()}
        state, metrics = self._network.update(state, grads, losses["loss"])
        return state, losses | metrics

    def _losses(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, " 2"]]]:
        """The weighted sum that is minimised, and (weighted sum of nats, weight) per modality."""
        model = self._network.merge(params)
        tokens, weights = batch["tokens"], self._target_weights(batch)
        samples = samples_of(tokens, self.vocabulary)[:, :-1] if self.config.isolate_samples else None
        hidden, targets = model(tokens[:, :-1], samples), tokens[:, 1:]
        found = cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            model.unembedding(),
            targets.reshape(-1),
            weights.reshape(-1),
            z_loss=self.config.z_loss,
            chunk=self.config.loss_chunk,
        )
        nll = found.nll.reshape(targets.shape)
        masks = self._by_modality("", weights, targets)
        if "query" in batch:
            masks |= self._by_modality("query_", weights * batch["query"][:, 1:], targets)
        return found.loss_sum, {name: jnp.stack([(nll * mask).sum(), mask.sum()]) for name, mask in masks.items()}

    def _by_modality(
        self, part: str, weights: Float[Array, "B L"], targets: Int[Array, "B L"]
    ) -> dict[str, Float[Array, "B L"]]:
        """The weights of all targets, of those that are text, and of those that are image."""
        kinds = {"text_": self.vocabulary.is_text(targets), "image_": self.vocabulary.is_image(targets)}
        return {f"{part}loss": weights} | {f"{part}{kind}loss": weights * there for kind, there in kinds.items()}

    def _target_weights(self, batch: Batch) -> Float[Array, "B L"]:
        weights = batch["weights"][:, 1:]
        if not self.config.isolate_samples:
            return weights
        samples = samples_of(batch["tokens"], self.vocabulary)
        return weights * (samples[:, 1:] == samples[:, :-1])

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Bits per token of causal validation sequences (text, `<break>`, image): all, text, image.

        And the same of the query documents alone, the last of each sample, whatever was retrieved for them.
        """
        sequences = len(self._validation.plans.epoch(0))
        # Fewer sequences than a batch has: some are read twice.
        steps = max(1, min(self.config.valid_batches, sequences // self.batch_size))
        rows = batch_sharding(jax.sharding.get_mesh())
        totals: dict[str, np.ndarray] = {}
        for batch in device_batches(self._validation, self.batch_size, 0, steps, rows):
            sums = jax.device_get(self._valid_step(state.params, batch))
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        return {
            bits: float(totals[name][0] / max(totals[name][1], 1.0)) / math.log(2)
            for name, bits in (MODALITIES | QUERY_MODALITIES).items()
        }


# Metric of the training step (nats) and its name at evaluation (bits).
MODALITIES = {"loss": "bits_per_token", "text_loss": "bits_per_text_token", "image_loss": "bits_per_image_token"}
QUERY_MODALITIES = {f"query_{name}": bits.replace("per", "per_query") for name, bits in MODALITIES.items()}

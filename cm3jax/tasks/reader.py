"""Task `reader`: trains the attribute reader on a source whose documents carry their attributes in `meta`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from cm3jax.config import build, fingerprint
from cm3jax.data.loader import device_batches
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Reason, RejectError, Source
from cm3jax.models.reader import Reader, ReaderConfig, with_params
from cm3jax.optim import OptimConfig
from cm3jax.parallel.specs import batch_sharding, replicated
from cm3jax.perf.traced import forward_flops
from cm3jax.reliability.anomaly import AnomalyConfig
from cm3jax.reliability.checkpoint import load_params, read_run_config
from cm3jax.state import TrainState
from cm3jax.tasks.network import Network
from cm3jax.tasks.task import Batch, Metrics
from cm3jax.tokens.document import Image
from cm3jax.tokens.image import to_float


@dataclasses.dataclass(frozen=True)
class ReaderTaskConfig:
    """Reader, data and optimizer of a run.

    Attributes:
      source, valid: as `data.sources.open.open_source` takes; pictures of the model's size.
      blur: the greatest share of a picture that is replaced by its blurred self in training.
      noise: the greatest standard deviation of the noise added in training, pixels in [-1, 1].
    """

    model: ReaderConfig
    source: str
    valid: str
    optim: OptimConfig = OptimConfig(
        learning_rate=4e-3, warmup_steps=30, b2=0.98, decay="cosine", final_ratio=0.01, weight_decay=0.05
    )
    anomaly: AnomalyConfig = AnomalyConfig()
    batch_size: int = 32
    blur: float = 0.5
    noise: float = 0.1


class ReaderExamples:
    """Example j of an endless stream, shuffled anew each epoch; documents are opened once and kept.

    Attributes:
      fingerprint: changes when any example would.
    """

    def __init__(self, source: Source, config: ReaderConfig, seed: int):
        """Examples of `source`.

        Raises:
          ValueError: the source is empty.
        """
        if not len(source):
            raise ValueError(f"no documents in source {source.name}")
        self.source, self.config, self.seed = source, config, seed
        self.fingerprint = fingerprint([source.fingerprint(), config.attributes, config.image_size, seed])
        self._opened: dict[int, dict[str, np.ndarray]] = {}
        # Two, because reading ahead over the end of an epoch goes back and forth between them.
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __reduce__(self):
        return ReaderExamples, (self.source, self.config, self.seed)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`image`: uint8 [S, S, 3]; `labels`: int32 [attributes], the class of each.

        Raises:
          RejectError: a document without a picture of the right size, or without an attribute.
        """
        epoch, i = divmod(index, len(self.source))
        return self.document(int(self._permutation(epoch)[i]))

    def document(self, index: int) -> dict[str, np.ndarray]:
        """Document `index` of the source as an example."""
        if index not in self._opened:
            self._opened[index] = self._open(index)
        return self._opened[index]

    def _make_permutation(self, epoch: int) -> Int[np.ndarray, " N"]:
        return generator(Purpose.IMAGE_ORDER, self.seed, epoch).permutation(len(self.source))

    def _open(self, index: int) -> dict[str, np.ndarray]:
        document, side = self.source[index], self.config.image_size
        pixels = next((s.pixels for s in document.segments if isinstance(s, Image) and s.pixels is not None), None)
        if pixels is None or pixels.shape != (side, side, 3):
            found = "none" if pixels is None else f"one of {pixels.shape}"
            raise RejectError(Reason.NO_IMAGE, f"expected a picture of {(side, side, 3)}, found {found}", document.id)
        return {"image": pixels, "labels": labels(self.config, document.meta.get("attributes", {}), document.id)}


def labels(config: ReaderConfig, attributes: dict[str, str], key: str = "") -> Int[np.ndarray, " A"]:
    """The class of each attribute of the config.

    Raises:
      RejectError: an attribute is missing or has an unknown value; `key` names the document.
    """
    classes = []
    for name, values in config.attributes:
        value = attributes.get(name)
        if value not in values:
            raise RejectError(Reason.MALFORMED, f"attribute {name} is {value!r}, expected one of {values}", key)
        classes.append(values.index(value))
    return np.array(classes, np.int32)


class ReaderTask:
    """Implements `tasks.task.Task`."""

    unit = "images"

    def __init__(self, config: ReaderTaskConfig, *, seed: int, steps: int):
        self.config, self.seed = config, seed
        self.batch_size = self.units_per_batch = config.batch_size
        self._network = Network(lambda rngs: Reader(config.model, rngs), config.optim, config.anomaly, steps)
        self.init, self.state_specs = self._network.init, self._network.state_specs
        side = config.model.image_size
        pictures = jax.ShapeDtypeStruct((config.batch_size, side, side, 3), jnp.float32)
        # Backward: once more for the weights and once more for the activations.
        self.flops_per_batch = 3.0 * forward_flops(self._logits, self._network.abstract, pictures)
        self._valid_step = jax.jit(lambda params, batch: replicated(self._correct(params, batch)))

    @functools.cached_property
    def examples(self) -> ReaderExamples:
        """The training pictures; opens their source."""
        return ReaderExamples(open_source(self.config.source), self.config.model, self.seed)

    @functools.cached_property
    def _validation(self) -> ReaderExamples:
        return ReaderExamples(open_source(self.config.valid), self.config.model, self.seed)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        side, attributes = self.config.model.image_size, len(self.config.model.attributes)
        return {
            "image": jax.ShapeDtypeStruct((self.batch_size, side, side, 3), jnp.uint8),
            "labels": jax.ShapeDtypeStruct((self.batch_size, attributes), jnp.int32),
        }

    def data_fingerprint(self) -> str:
        return fingerprint([self.examples.fingerprint, self.batch_size])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update on degraded pictures; the loss is the cross-entropy summed over attributes."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        images = degrade(to_float(batch["image"]), key, self.config.blur, self.config.noise)

        def objective(params):
            return self._loss(self._logits(params, images), batch["labels"])

        loss, grads = jax.value_and_grad(objective)(state.params)
        state, metrics = self._network.update(state, grads, loss)
        return state, {"loss": loss} | metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Accuracy on the validation source, of each attribute and their mean."""
        steps = max(1, len(self._validation.source) // self.batch_size)
        rows = batch_sharding(jax.sharding.get_mesh())
        correct = [
            jax.device_get(self._valid_step(state.params, batch))
            for batch in device_batches(self._validation, self.batch_size, 0, steps, rows)
        ]
        accuracy = np.mean(correct, axis=0)
        names = [f"accuracy_{name}" for name, _ in self.config.model.attributes]
        return {"accuracy": float(accuracy.mean())} | dict(zip(names, accuracy.tolist(), strict=True))

    def _logits(self, params: Any, images: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B classes"], ...]:
        return self._network.merge(params)(images)

    def _loss(self, logits: tuple[Float[Array, "B classes"], ...], wanted: Int[Array, "B A"]) -> Float[Array, ""]:
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(scores, wanted[:, column]).mean()
            for column, scores in enumerate(logits)
        ]
        return jnp.stack(losses).sum()

    def _correct(self, params: Any, batch: Batch) -> Float[Array, " A"]:
        """Share of the pictures whose attribute is told, of each attribute."""
        logits = self._logits(params, to_float(batch["image"]))
        told = jnp.stack([scores.argmax(-1) for scores in logits], axis=-1)
        return (told == batch["labels"]).mean(axis=0)


def degrade(images: Float[Array, "B S S 3"], key: jax.Array, blur: float, noise: float) -> Float[Array, "B S S 3"]:
    """Blurs and adds noise, each picture by its own amount up to the given one.

    A reader trained on clean drawings alone would fail on decoded pictures, whose edges are soft.
    """
    amounts, grain = jax.random.split(key)
    share, deviation = jax.random.uniform(amounts, (2, images.shape[0], 1, 1, 1))
    soft = _blurred(_blurred(images, 1), 2)
    mixed = images + blur * share * (soft - images)
    return mixed + noise * deviation * jax.random.normal(grain, images.shape)


def _blurred(images: Float[Array, "B S S 3"], axis: int) -> Float[Array, "B S S 3"]:
    """Binomial filter 1 4 6 4 1 along an axis, edges repeated."""
    pad = [(2, 2) if i == axis else (0, 0) for i in range(4)]
    padded, size = jnp.pad(images, pad, mode="edge"), images.shape[axis]
    taps = [jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(5)]
    return (taps[0] + 4 * taps[1] + 6 * taps[2] + 4 * taps[3] + taps[4]) / 16


def load_reader(run: Path, step: int | None = None) -> Reader:
    """The reader of a `reader` run, at its newest checkpoint or at `step`.

    Raises:
      CheckpointError: there is none.
    """
    model = build(ReaderConfig, read_run_config(run)["reader"]["model"], "reader.model.")
    return with_params(model, load_params(Path(run) / "checkpoints", step=step)[1])

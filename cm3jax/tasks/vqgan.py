"""Task `vqgan`: trains the image tokenizer and its discriminator, both updated from one forward pass."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cm3jax.config import fingerprint
from cm3jax.data.images import ImageConfig, ImageExamples
from cm3jax.data.loader import device_batches
from cm3jax.data.sources.open import open_source
from cm3jax.losses import adaptive_weight, generator_loss, hinge_discriminator_loss, psnr, reconstruction_loss
from cm3jax.models.discriminator import Discriminator, DiscriminatorConfig
from cm3jax.models.perceptual import load_lpips, lpips
from cm3jax.models.quantizer import code_counts, perplexity, revive, usage_share
from cm3jax.models.vqgan import VQGAN, VQGANConfig
from cm3jax.optim import OptimConfig, apply_updates, opt_state_specs, schedule
from cm3jax.parallel.specs import batch_sharding, replicated, weight_specs
from cm3jax.perf.traced import forward_flops
from cm3jax.reliability.anomaly import AnomalyConfig, fresh_guard, guard_specs, guarded
from cm3jax.state import TrainState, fresh_state
from cm3jax.tasks.task import Batch, Metrics
from cm3jax.tokens.image import to_float

logger = logging.getLogger(__name__)

Images = Float[Array, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """Files of the LPIPS weights (`models.perceptual.load_lpips`) and the weight of the term."""

    vgg: str
    heads: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class VQGANLossConfig:
    """What the generator minimises, and its adversary. Defaults are those of the released ImageNet recipe.

    Attributes:
      perceptual: None trains without the perceptual term.
      discriminator: None trains without an adversary.
      disc_start: updates before the adversary is switched on.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    codebook_weight: float = 1.0
    perceptual: PerceptualConfig | None = None
    discriminator: DiscriminatorConfig | None = DiscriminatorConfig()
    disc_weight: float = 0.8
    disc_start: int = 250_001


@dataclasses.dataclass(frozen=True)
class ImageDataConfig:
    """Pictures to train on; the size is the model's.

    Attributes:
      source, valid: as `data.sources.open.open_source` takes; without `valid`, a share of `source` is held out.
    """

    source: str
    valid: str | None = None
    crop: Literal["center", "random"] = "random"
    flip: bool = True
    cache_bytes: int = 1 << 30


@dataclasses.dataclass(frozen=True)
class VQGANTaskConfig:
    """Tokenizer, losses, data and optimizers of a run. `batch_size` counts images over all devices.

    Attributes:
      warmup_steps: of both learning rates, linear from 0.
      decay: of both afterwards, to a tenth; the released recipe has none.
      ema_decay: of the averaged generator, which is evaluated and used; less in the first updates.
      revive_after: updates without use after which a code is moved to where the encoder's outputs are.
      valid_images: how many pictures of the validation source to evaluate on, at most.
    """

    model: VQGANConfig
    data: ImageDataConfig
    loss: VQGANLossConfig = VQGANLossConfig()
    anomaly: AnomalyConfig = AnomalyConfig()
    batch_size: int = 192
    learning_rate: float = 1e-4
    disc_learning_rate: float = 1e-4
    warmup_steps: int = 1000
    decay: Literal["linear", "cosine", "constant"] = "constant"
    b1: float = 0.5
    b2: float = 0.9
    ema_decay: float = 0.999
    revive_after: int = 500
    valid_images: int = 5000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adversary:
    """What the discriminator contributes to an update; all zero before `disc_start`.

    Attributes:
      pull: gradient of the generator's adversarial loss at the reconstructions.
      gradients: of the discriminator's own loss at its weights.
    """

    generator_loss: Float[Array, ""]
    pull: Images
    discriminator_loss: Float[Array, ""]
    gradients: Any


@dataclasses.dataclass(frozen=True)
class Gradients:
    """One forward and backward pass.

    Attributes:
      gradients: of each network's loss at its weights, as `TrainState.params`.
      latents: the encoder's outputs.
      codes: that the latents were given.
      metrics: the losses.
    """

    gradients: Any
    latents: Float[Array, "B h w E"]
    codes: Int[Array, "B h w"]
    metrics: Metrics


class VQGANTask:
    """Implements `tasks.task.Task`.

    `state.params` holds `generator` and, if there is an adversary, `discriminator`; `state.extra` the averaged
    generator (`ema`) and, for each code, the updates since it was last used (`idle`).
    """

    unit = "images"

    def __init__(self, config: VQGANTaskConfig, *, seed: int, steps: int):
        """Reads the perceptual weights.

        Raises:
          ValueError, FileNotFoundError: a weight file cannot be used.
        """
        self.config, self.seed = config, seed
        self._graphs, self._abstract = {}, {}
        for name, build in _networks(config).items():
            self._graphs[name], self._abstract[name] = nnx.split(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
        self._lpips = _load_perceptual(config.loss.perceptual)
        self._optimizer = _optimizer(config, steps)
        self._evaluate_batch = jax.jit(lambda params, batch: replicated(self._evaluation(params, batch)))
        self.batch_size = self.units_per_batch = config.batch_size
        self.flops_per_batch = config.batch_size * self._flops_per_image()

    @functools.cached_property
    def examples(self) -> ImageExamples:
        """The training pictures; opens their source.

        Raises:
          ValueError, FileNotFoundError: the source cannot be used.
        """
        return _examples(self.config, self.config.data.source, "train", self.seed)

    @functools.cached_property
    def _valid(self) -> ImageExamples:
        return _examples(self.config, self.config.data.valid or self.config.data.source, "valid", 0)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        side = self.config.model.resolution
        return {"image": jax.ShapeDtypeStruct((self.batch_size, side, side, 3), jnp.uint8)}

    def init(self, key: jax.Array) -> TrainState:
        keys = jax.random.split(key, len(self._graphs))
        params = {
            name: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(k))))
            for k, (name, build) in zip(keys, _networks(self.config).items(), strict=True)
        }
        # Codes start as overdue: all that the first batch does not choose are moved onto the encoder's outputs.
        idle = jnp.full(self.config.model.codes, self.config.revive_after, jnp.int32)
        # A copy: the step is given the whole state to overwrite, and may not be given one buffer twice.
        extra = {"ema": jax.tree.map(jnp.copy, params["generator"]), "idle": idle}
        return fresh_state(params, self._optimizer.init(params), fresh_guard(self.config.anomaly), extra)

    def state_specs(self) -> TrainState:
        specs = {name: weight_specs(state) for name, state in self._abstract.items()}
        abstract = {name: nnx.to_pure_dict(state) for name, state in self._abstract.items()}
        moments = opt_state_specs(self._optimizer, abstract, specs)
        step: Any = P()
        return TrainState(step, specs, moments, {"ema": specs["generator"], "idle": P()}, guard_specs())

    def data_fingerprint(self) -> str:
        return fingerprint([self.examples.fingerprint, self.config.batch_size])

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of generator and discriminator, both from the generator's present reconstructions."""
        found = self.gradients(state, to_float(batch["image"]))
        updated, norm = apply_updates(self._optimizer, state, found.gradients)
        updated, moved = self._maintain(updated, found)
        state, update = guarded(self.config.anomaly, state, updated, found.metrics["reconstruction_loss"], norm)
        counts = code_counts(found.codes, self.config.model.codes)
        usage = {"codebook_perplexity": perplexity(counts), "codebook_usage": usage_share(counts), "revived": moved}
        return state, found.metrics | usage | update

    def gradients(self, state: TrainState, images: Images) -> Gradients:
        """Gradients of both networks' losses at `state.params`, for images in [-1, 1]."""
        loss = self.config.loss
        (reconstructions, codebook_loss), backward, (latents, codes) = jax.vjp(
            lambda params: self._reconstruct(params, images), state.params["generator"], has_aux=True
        )
        (reconstruction, parts), pull = jax.value_and_grad(self._reconstruction, has_aux=True)(reconstructions, images)
        metrics = {"reconstruction_loss": reconstruction, "codebook_loss": codebook_loss, **parts}
        gradients = {}
        if loss.discriminator is not None:
            adversary = self._adversary(state, reconstructions, images)
            # Only the last kernel's gradient of these two backward passes is used; the compiler drops the rest of them.
            weight = loss.disc_weight * adaptive_weight(
                _last_kernel(backward((pull, 0.0))), _last_kernel(backward((adversary.pull, 0.0)))
            )
            pull = pull + weight * adversary.pull
            gradients["discriminator"] = adversary.gradients
            metrics |= {
                "generator_loss": adversary.generator_loss,
                "discriminator_loss": adversary.discriminator_loss,
                "adversarial_weight": weight * (state.step >= loss.disc_start),
            }
        (gradients["generator"],) = backward((pull, loss.codebook_weight))
        return Gradients(gradients, latents, codes, metrics)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Averaged generator on the validation pictures: L1, PSNR, codebook perplexity and usage, LPIPS if given."""
        size = self.batch_size
        steps = max(1, min(self.config.valid_images, len(self._valid.source)) // size)
        rows = batch_sharding(jax.sharding.get_mesh())
        totals: dict[str, Any] = {}
        for batch in device_batches(self._valid, size, 0, steps, rows):
            found = jax.device_get(self._evaluate_batch(state.extra["ema"], batch))
            totals = {name: totals.get(name, 0.0) + value for name, value in found.items()}
        counts = totals.pop("counts")
        return {name: float(total / steps) for name, total in totals.items()} | {
            "codebook_perplexity": float(perplexity(counts)),
            "codebook_usage": float(usage_share(counts)),
        }

    def _reconstruct(self, params: Any, images: Images) -> tuple[tuple[Images, Array], tuple[Array, Array]]:
        """((reconstructions, codebook loss), (latents, codes)); only the first pair has a gradient."""
        model = nnx.merge(self._graphs["generator"], params)
        latents = model.encode(images)
        quantized = model.quantize(latents)
        return (model.decode(quantized.z_q), quantized.loss), (latents, quantized.codes)

    def _reconstruction(self, reconstructions: Images, images: Images) -> tuple[Float[Array, ""], Metrics]:
        loss = self.config.loss
        total = reconstruction_loss(reconstructions, images, loss.l1_weight, loss.l2_weight)
        parts = {"l1": jnp.mean(jnp.abs(reconstructions - images)), "psnr": jnp.mean(psnr(reconstructions, images))}
        if loss.perceptual is not None:
            parts["lpips"] = jnp.mean(lpips(self._lpips, reconstructions, images))
            total += loss.perceptual.weight * parts["lpips"]
        return total, parts

    def _adversary(self, state: TrainState, reconstructions: Images, images: Images) -> Adversary:
        params = state.params["discriminator"]

        def judge(params: Any, pictures: Images) -> Float[Array, "B h w 1"]:
            return nnx.merge(self._graphs["discriminator"], params)(pictures)

        def active() -> Adversary:
            fooling, pull = jax.value_and_grad(lambda x: generator_loss(judge(params, x)))(reconstructions)
            telling, gradients = jax.value_and_grad(
                lambda params: hinge_discriminator_loss(judge(params, images), judge(params, reconstructions))
            )(params)
            return Adversary(fooling, pull, telling, gradients)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(active))
        return jax.lax.cond(state.step >= self.config.loss.disc_start, active, lambda: zeros)

    def _maintain(self, state: TrainState, found: Gradients) -> tuple[TrainState, Float[Array, ""]]:
        """Averages the generator and moves dead codes, in the average too; returns how many were moved."""
        generator, size = state.params["generator"], self.config.model.codes
        done = state.step + 1
        decay = jnp.minimum(self.config.ema_decay, (1 + done) / (10 + done))
        ema = optax.incremental_update(generator, state.extra["ema"], 1 - decay)
        moved = revive(
            generator["quantize"]["embedding"],
            state.extra["idle"],
            code_counts(found.codes, size),
            found.latents,
            jax.random.fold_in(jax.random.key(self.seed), done),
            self.config.revive_after,
        )
        averaged = jnp.where(moved.dead[:, None], moved.codebook, ema["quantize"]["embedding"])
        state = state.replace(
            params=state.params | {"generator": _with_codebook(generator, moved.codebook)},
            extra={"ema": _with_codebook(ema, averaged), "idle": moved.idle},
        )
        return state, jnp.sum(moved.dead, dtype=jnp.float32)

    def _evaluation(self, params: Any, batch: Batch) -> Metrics:
        images = to_float(batch["image"])
        (reconstructions, _), (_, codes) = self._reconstruct(params, images)
        _, parts = self._reconstruction(jnp.clip(reconstructions, -1, 1), images)
        return parts | {"counts": code_counts(codes, self.config.model.codes)}

    def _flops_per_image(self) -> float:
        """Forward + backward. The generator and LPIPS (whose weights have no gradient) cost three forward passes.

        The discriminator sees the reconstruction for the generator (2 passes: no weight gradients) and for itself (3,
        less the forward pass that both share), and the original (3).
        """
        side = self.config.model.resolution
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        total = 3 * forward_flops(self._reconstruct, nnx.to_pure_dict(self._abstract["generator"]), image)
        if self._lpips is not None:
            total += 3 * forward_flops(lambda a, b: lpips(self._lpips, a, b), image, image) / 2
        if "discriminator" in self._graphs:
            graph = self._graphs["discriminator"]
            abstract = nnx.to_pure_dict(self._abstract["discriminator"])
            total += 7 * forward_flops(lambda p, x: nnx.merge(graph, p)(x), abstract, image)
        return total


def _networks(config: VQGANTaskConfig) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
    networks: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {"generator": lambda rngs: VQGAN(config.model, rngs)}
    discriminator = config.loss.discriminator
    if discriminator is not None:
        networks["discriminator"] = lambda rngs: Discriminator(discriminator, rngs)
    return networks


def _optimizer(config: VQGANTaskConfig, steps: int) -> optax.GradientTransformation:
    """Adam for both networks, each at its own learning rate."""
    rates = {"generator": config.learning_rate, "discriminator": config.disc_learning_rate}
    descend = optax.stateless(
        lambda updates, _: {name: optax.tree.scale(-rates[name], part) for name, part in updates.items()}
    )
    shape = OptimConfig(learning_rate=1.0, warmup_steps=config.warmup_steps, decay=config.decay)
    scheduled = optax.scale_by_schedule(schedule(shape, steps))
    return optax.chain(optax.scale_by_adam(config.b1, config.b2), scheduled, descend)


def _load_perceptual(config: PerceptualConfig | None) -> Any:
    if config is None:
        logger.warning("no perceptual weights are given: training without the LPIPS term, expect blurred detail")
        return None
    return load_lpips(config.vgg, config.heads)


def _examples(config: VQGANTaskConfig, spec: str, split: Literal["train", "valid"], seed: int) -> ImageExamples:
    """Training pictures are cropped and mirrored as configured, validation pictures never."""
    data, side = config.data, config.model.resolution
    training = split == "train"
    options = ImageConfig(side, data.crop if training else "center", data.flip and training, data.cache_bytes)
    return ImageExamples(open_source(spec, split=split), options, seed)


def _last_kernel(gradients: tuple[Any]) -> Float[Array, "3 3 C O"]:
    return gradients[0]["decoder"]["conv_out"]["kernel"]


def _with_codebook(generator: Any, codebook: Float[Array, "K E"]) -> Any:
    return generator | {"quantize": generator["quantize"] | {"embedding": codebook}}

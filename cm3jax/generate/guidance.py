"""Guidance: the next token is drawn from what the logits of several streams of one request say together.

Streams see different prompts and are fed the same drawn tokens. Stream 0 is the conditional one.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm3jax.generate.thresholds import kth_largest

Scale = float | tuple[float, float]
Setting = TypeVar("Setting")


@dataclasses.dataclass(frozen=True)
class ContrastiveTopK:
    """CD-K (CM3Leon, arXiv 2309.02591, equation 3).

    Attributes:
      alpha: ids at least this share as likely as the k-th most likely one are candidates.
      k: 1 is contrastive decoding (arXiv 2210.15097), which in images comes close to taking the most likely id.
      amateur_temperature: divides the logits of stream 1.

    Raises:
      ValueError: a value out of range.
    """

    alpha: float = 0.5
    k: int = 8
    amateur_temperature: float = 1.0

    def __post_init__(self):
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"cdk: alpha must be >= 0 and finite, found {self.alpha}")
        if self.k < 1:
            raise ValueError(f"cdk: k must be >= 1, found {self.k}")
        if not 0 < self.amateur_temperature < float("inf"):
            raise ValueError(f"cdk: amateur_temperature must be > 0 and finite, found {self.amateur_temperature}")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What a request does with its streams.

    Attributes:
      weights: of the streams' logits; they sum to one.
      last: the weights at the last code of an image, between which and `weights` they change linearly; None for the
        same weights throughout. Text has `weights`.
      contrast: draws by the contrast of stream 0 against stream 1 in place of the weighted sum.
    """

    weights: tuple[float, ...] = (1.0,)
    last: tuple[float, ...] | None = None
    contrast: ContrastiveTopK | None = None

    @property
    def streams(self) -> int:
        """How many streams it needs."""
        return max(len(self.weights), 1 if self.contrast is None else 2)


def classifier_free(scale: Scale) -> Guidance:
    """Streams conditional, unconditional: l_u + scale (l_c - l_u) (CM3Leon, arXiv 2309.02591, section 3.3).

    Args:
      scale: 1 is the conditional stream alone; a pair is for the first and the last code of an image.
    """
    first, last = _ends(scale)
    return Guidance(_one_way(first), None if first == last else _one_way(last))


def two_way(image_scale: Scale, text_scale: Scale) -> Guidance:
    """Streams full, image only, unconditional, for editing an image by an instruction.

    l_u + image_scale (l_i - l_u) + text_scale (l_f - l_i) (InstructPix2Pix, arXiv 2211.09800, eq. 3).
    """
    first, last = (_two_way(i, t) for i, t in zip(_ends(image_scale), _ends(text_scale), strict=True))
    return Guidance(first, None if first == last else last)


def alternate(count: int, first: Setting, second: Setting) -> list[Setting]:
    """Settings of `count` samples of one prompt, half of each, as the paper mixes top-p and CD-K (its figure 4)."""
    return [second if i % 2 else first for i in range(count)]


def at_share(
    first: Float[Array, "B streams"], last: Float[Array, "B streams"], share: Float[Array, " B"]
) -> Float[Array, "B streams"]:
    """The weights when this share of an image, in [0, 1], is drawn."""
    return first + share[:, None] * (last - first)


def mix(logits: Float[Array, "B streams V"], weights: Float[Array, "B streams"]) -> Float[Array, "B V"]:
    """Weighted sum over the streams; forbidden ids are masked afterwards, since -inf cannot be mixed."""
    return jnp.sum(logits * weights[:, :, None], axis=1)


def contrast(
    expert: Float[Array, "B V"],
    amateur: Float[Array, "B V"],
    alpha: Float[Array, " B"],
    k: Int[Array, " B"],
    amateur_temperature: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """log p_expert - log p_amateur of the candidates, -inf for all others (CM3Leon, arXiv 2309.02591, equation 3).

    Candidates are the ids with p_expert >= alpha * (the k-th largest p_expert). An id with logit -inf is none.
    """
    log_expert = jax.nn.log_softmax(expert, axis=-1)
    log_amateur = jax.nn.log_softmax(amateur / amateur_temperature[:, None], axis=-1)
    lowest = kth_largest(log_expert, jnp.minimum(k, expert.shape[-1])) + jnp.log(alpha)
    candidate = (log_expert >= lowest[:, None]) & (log_expert > -jnp.inf)
    return jnp.where(candidate, log_expert - log_amateur, -jnp.inf)


def _ends(scale: Scale) -> Sequence[float]:
    return scale if isinstance(scale, tuple) else (scale, scale)


def _one_way(scale: float) -> tuple[float, float]:
    return scale, 1.0 - scale


def _two_way(image_scale: float, text_scale: float) -> tuple[float, float, float]:
    return text_scale, image_scale - text_scale, 1.0 - image_scale

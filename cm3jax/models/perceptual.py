"""LPIPS (Zhang et al. 2018, version 0.1): a distance of images in the features of a fixed VGG16.

The weights come from files: the convolutions from a safetensors file with torchvision's names (`features.0.weight`),
the five linear heads from the `.npz` of the published ones (`lin0.model.1.weight`).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cm3jax.parallel.specs import constrain

# Mean and deviation of ImageNet, restated for images in [-1, 1] as the published code rounds them.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)

# VGG16: five stages; index of each convolution in torchvision's list, and its (inputs, outputs).
STAGES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)

EPSILON = 1e-10

Weight = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LPIPSWeights:
    """The fixed weights of the distance.

    Attributes:
      convolutions: for each stage its (kernel HWIO, bias) pairs.
      heads: non-negative channel weights of each stage.
    """

    convolutions: tuple[tuple[tuple[Float[Weight, "3 3 I O"], Float[Weight, " O"]], ...], ...]
    heads: tuple[Float[Weight, " C"], ...]


def load_lpips(vgg: str | Path, heads: str | Path) -> LPIPSWeights:
    """Reads the weights of VGG16 (safetensors) and of the linear heads (npz).

    Raises:
      ValueError: a file cannot be read, or an array is missing or has another shape; names file and key.
    """
    try:
        tensors = load_file(vgg)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{vgg}: not a readable safetensors file ({error})") from error
    try:
        with np.load(heads, allow_pickle=False) as arrays:
            linear = dict(arrays)
    except (OSError, ValueError) as error:
        raise ValueError(f"{heads}: not a readable npz file ({error})") from error
    convolutions = tuple(
        tuple(
            (
                _take(tensors, vgg, f"features.{index}.weight", (width_out, width_in, 3, 3)).transpose(2, 3, 1, 0),
                _take(tensors, vgg, f"features.{index}.bias", (width_out,)),
            )
            for index, width_in, width_out in stage
        )
        for stage in STAGES
    )
    return LPIPSWeights(
        convolutions,
        tuple(
            _take(linear, heads, f"lin{i}.model.1.weight", (1, stage[-1][2], 1, 1)).reshape(-1)
            for i, stage in enumerate(STAGES)
        ),
    )


def lpips(
    weights: LPIPSWeights, images: Float[Array, "B H W 3"], others: Float[Array, "B H W 3"]
) -> Float[Array, " B"]:
    """Distance of each pair of images in [-1, 1]; 0 for equal ones. Sides must be at least 16."""
    batch = len(images)
    features = vgg_features(weights, jnp.concatenate([images, others]))
    distance = jnp.zeros(batch)
    for stage, head in zip(features, weights.heads, strict=True):
        stage = _unit_channels(stage)
        distance += jnp.mean(jnp.square(stage[:batch] - stage[batch:]) @ head, axis=(1, 2))
    return distance


def vgg_features(weights: LPIPSWeights, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
    """The last activations (after ReLU) of each of the five stages."""
    x = (images - SHIFT) / SCALE
    features: list[Array] = []
    for stage in weights.convolutions:
        if features:
            x = _halve(x)
        for kernel, bias in stage:
            x = jax.lax.conv_general_dilated(
                x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = constrain(jax.nn.relu(x + bias), "images")
        features.append(x)
    return features


def _halve(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _unit_channels(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    # Bounded below inside the root: where every channel is 0 the gradient of the root would be infinite.
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), EPSILON**2))
    return x / (norm + EPSILON)


def _take(arrays: dict[str, np.ndarray], path: str | Path, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in arrays:
        raise ValueError(f"{path}: no array {key!r}")
    if arrays[key].shape != shape:
        raise ValueError(f"{path}: {key} has shape {arrays[key].shape}, expected {shape}")
    return arrays[key].astype(np.float32)

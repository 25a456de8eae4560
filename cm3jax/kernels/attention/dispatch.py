"""One entry for attention: which kernel runs is decided here, and said aloud when it is not the one asked for."""

import functools
import logging
from typing import Literal

import jax
from jaxtyping import Array, Float

from cm3jax.kernels.attention.chunked import chunked_attention
from cm3jax.kernels.attention.cudnn import cudnn_attention, cudnn_refuses
from cm3jax.kernels.attention.dense import dense_attention
from cm3jax.kernels.attention.mask import Mask
from cm3jax.kernels.attention.splash import splash_attention, splash_refuses

logger = logging.getLogger(__name__)

Backend = Literal["auto", "dense", "chunked", "cudnn", "splash"]
KERNELS = {
    "dense": dense_attention,
    "chunked": chunked_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
# Kernels that run on one platform only, and what else they need.
PLATFORM = {"cudnn": "gpu", "splash": "tpu"}
REFUSES = {"cudnn": cudnn_refuses, "splash": splash_refuses}
FASTEST = {"gpu": "cudnn", "tpu": "splash"}
FALLBACK = "chunked"
# Larger than the cache of a CPU asks for: matrix units want longer products.
ACCELERATOR_BLOCK = 512


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Mask,
    backend: Backend = "auto",
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys that `mask` shows; G key heads serve H query heads.

    Queries with positions of their own always take the dense kernel. For a whole sequence `auto` is
    splash on TPUs, cuDNN on NVIDIA GPUs and chunked elsewhere; what cannot run is replaced by chunked, with a warning.
    """
    if mask.positions is not None:
        return dense_attention(q, k, v, mask)
    kernel, platform = choose(q, k, mask, backend), _platform()
    if kernel == "chunked" and platform != "cpu":
        return chunked_attention(q, k, v, mask, ACCELERATOR_BLOCK)
    return KERNELS[kernel](q, k, v, mask)


def choose(q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], mask: Mask, backend: Backend) -> str:
    """The kernel for a whole sequence."""
    mesh, platform = jax.sharding.get_abstract_mesh(), _platform()
    wanted = FASTEST.get(platform, FALLBACK) if backend == "auto" else backend
    if wanted not in REFUSES:
        return wanted
    reason = REFUSES[wanted](q, k, mask, mesh)
    if platform != PLATFORM[wanted]:
        reason = f"it runs on {PLATFORM[wanted]} only, these devices are {platform}"
    if reason is None:
        return wanted
    _warn_once(f"attention: {wanted} ({backend} was asked for) cannot run: {reason}; {FALLBACK} runs instead")
    return FALLBACK


def _platform() -> str:
    """Of the mesh, whose devices may be of a machine that is not here (compiling ahead of time)."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform == "cuda" else platform


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)

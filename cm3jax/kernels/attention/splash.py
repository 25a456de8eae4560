"""The splash kernel of TPUs: blocks that the mask empties are skipped, each device runs on its own rows and heads."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cm3jax.kernels.attention.chunked import RESIDUAL
from cm3jax.kernels.attention.mask import Mask
from cm3jax.parallel.specs import ACTIVATIONS

LANES = 128
LARGEST_BLOCK = 512


def splash_refuses(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], mask: Mask, mesh: jax.sharding.AbstractMesh
) -> str | None:
    """Why the kernel cannot take these arrays on this mesh; None if it can."""
    if q.shape[1] % LANES:
        return f"it needs a length that is a multiple of {LANES}, found {q.shape[1]}"
    if mesh.empty:
        return None
    tensor = mesh.shape["tensor"]
    if k.shape[2] % tensor:
        return f"it needs key heads divisible by tensor = {tensor}, found {k.shape[2]}"
    rows = mesh.size // tensor
    if q.shape[0] % rows:
        return f"it needs rows divisible by the {rows} devices of the batch, found {q.shape[0]}"
    return None


def splash_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    mask: Mask,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """`dense_attention` of a whole sequence of a multiple of 128 tokens.

    Args:
      interpret: run the kernel's program step by step, for tests on other devices.
    """
    scaled = q * jnp.asarray(q.shape[3] ** -0.5, q.dtype)
    run = functools.partial(_local, window=mask.window, interpret=interpret)
    arguments = (scaled, k, v) if mask.segments is None else (scaled, k, v, mask.segments)
    if jax.sharding.get_abstract_mesh().empty:
        return run(*arguments)
    heads, tokens = ACTIVATIONS["heads"], ACTIVATIONS["tokens"]
    specs: tuple[P, ...] = (heads,) * 3 + (tokens,) * (len(arguments) - 3)
    return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)(*arguments)


def _local(q, k, v, segments=None, *, window: int | None, interpret: bool):
    """The rows and heads of one device."""
    length, heads = q.shape[1], q.shape[2]
    kernel = _kernel(length, heads, window, interpret)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))

    def row(q, k, v, segments=None):
        return kernel(q, k, v, segment_ids=None if segments is None else kernels.SegmentIds(segments, segments))

    return jnp.swapaxes(jax.vmap(row)(q, k, v, *([] if segments is None else [segments])), 1, 2)


def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> kernels.SplashAttentionKernel:
    shape = (length, length)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    size = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
    blocks = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        use_fused_bwd_kernel=True,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )

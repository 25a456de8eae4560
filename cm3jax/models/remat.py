"""What the backward pass of a stack of layers keeps and what it recomputes.

| policy | kept for each layer | recomputed |
| --- | --- | --- |
| none | everything | nothing |
| dots | products with weights, attention's output | the rest: norms, activations, scores |
| offload | the same, in the host's memory (attention's output stays) | the rest |
| full | the layer's input | the layer |
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from cm3jax.kernels.attention.chunked import RESIDUAL

Remat = Literal["none", "dots", "offload", "full"]

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_TO_HOST = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
_ATTENTION = jax.checkpoint_policies.save_only_these_names(RESIDUAL)


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, the body of a scan, with its backward pass as the policy says."""
    if remat == "none":
        return layer
    policies = {"dots": _besides_attention(_DOTS), "offload": _besides_attention(_TO_HOST), "full": None}
    # Inside a scan the compiler cannot merge the recomputation with the forward pass, so the barrier is not needed.
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)


def _besides_attention(policy: Callable[..., Any]) -> Callable[..., Any]:
    def decide(primitive: Any, *args: Any, **params: Any) -> Any:
        return _ATTENTION(primitive, *args, **params) or policy(primitive, *args, **params)

    return decide

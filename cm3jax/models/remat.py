"""What the backward pass of a stack of layers keeps and what it recomputes.

| policy | kept for each layer | recomputed |
| --- | --- | --- |
| none | everything | nothing |
| dots | products with weights (ReLU in place of the one before it), attention's output | the rest: norms, scores |
| offload | the same, in the host's memory (attention's output stays) | the rest |
| full | the layer's input | the layer |
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

from cm3jax.kernels.attention.chunked import RESIDUAL
from cm3jax.kernels.attention.cudnn import FORWARD

# Name of activations that the backward pass keeps in place of the products before them.
ACTIVATION = "activation"

Remat = Literal["none", "dots", "offload", "full"]

_SAVED = jax.checkpoint_policies.save_only_these_names
# What becomes of products with weights, and of the activations that stand for some of them.
_ON_DEVICE = (jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVED(ACTIVATION))
_IN_HOST = (
    jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ACTIVATION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
)


def rematerialised(layer: Callable[..., Any], remat: Remat, looped: bool = True) -> Callable[..., Any]:
    """`layer`, the body of a scan, with its backward pass as the policy says.

    Args:
      looped: the scan is compiled as a loop, not unrolled.
    """
    if remat == "none":
        return layer
    policies = {"dots": _besides_attention(*_ON_DEVICE), "offload": _besides_attention(*_IN_HOST), "full": None}
    # Across two loops the compiler cannot merge the recomputation with the forward pass, so no barrier is needed.
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=not looped)


def _besides_attention(products: Callable[..., Any], activations: Callable[..., Any]) -> Callable[..., Any]:
    attention = _SAVED(RESIDUAL)

    def decide(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name == FORWARD or attention(primitive, *args, **params):
            return True
        policy = activations if params.get("name") == ACTIVATION else products
        return policy(primitive, *args, **params)

    return decide

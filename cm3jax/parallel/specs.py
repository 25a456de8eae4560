"""Every named sharding of the program, in one table.

A model tags each weight with a name (`nnx.Param(value, spec="mlp_up")`) and asks for activations by name
(`constrain(x, "residual")`); what the names mean on the mesh `replica, data, fsdp, tensor` is decided here alone.
Weights of stacked layers carry one more leading dimension, which is never sharded.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("replica", "data", "fsdp")

WEIGHTS: dict[str, P] = {
    "replicated": P(),
    "embedding": P("tensor", "fsdp"),  # [vocabulary, d_model]
    "positions": P(None, "fsdp"),  # [max_len, d_model]
    "qkv": P("fsdp", "tensor", None),  # [d_model, heads, head_dim]
    "attention_out": P("tensor", None, "fsdp"),  # [heads, head_dim, d_model]
    "mlp_up": P("fsdp", "tensor"),  # [d_model, d_ff]
    "mlp_down": P("tensor", "fsdp"),  # [d_ff, d_model]
    "conv": P(None, None, None, "fsdp"),  # [height, width, in, out]
    "conv_narrow": P(None, None, "fsdp", None),  # the same, with few outputs
    "dense": P("fsdp", None),  # [in, out]
    "codebook": P("fsdp", None),  # [codes, dim]
}

# Hidden matrices: how many of their axes, counted from the first, are summed over in a product; the rest are outputs.
INPUT_AXES = {"qkv": 1, "attention_out": 2, "mlp_up": 1, "mlp_down": 1}

ACTIVATIONS: dict[str, P] = {
    "tokens": P(BATCH, None),  # [B, L]
    "residual": P(BATCH, None, None),  # [B, L, d_model]
    "heads": P(BATCH, None, "tensor", None),  # [B, L, heads, head_dim]
    "hidden": P(BATCH, None, "tensor"),  # [B, L, d_ff]
    "logits": P(BATCH, "tensor"),  # [B, vocabulary], of the next id
    "embedding_lookup": P(None, None),  # a table gathered whole before a lookup
    "unembedding": P("tensor", None),  # the output matrix as the loss uses it, once for all chunks of tokens
    "cache": P(BATCH, "tensor", None, None),  # [B, key heads, slots, head_dim], one layer
    "images": P(BATCH, None, None, None),  # [B, H, W, C]
    "features": P(BATCH, None),  # [B, features], or [B, pairs]
}


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Asks the compiler to lay the activation `x` out as the named spec; no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ACTIVATIONS[name])


def constrain_as(tree: Any, specs: Any) -> Any:
    """Asks the compiler to lay a tree of arrays out as a tree of specs (or one spec); no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs)


def replicated(tree: Any) -> Any:
    """Whole on every device, so that every process can read it."""
    return constrain_as(tree, P())


def conv_spec(features_in: int, features_out: int) -> str:
    """The name of a kernel's spec: split by outputs, or by inputs where the outputs are few (pixels, latents)."""
    if features_out % 32 == 0:
        return "conv"
    return "conv_narrow" if features_in % 32 == 0 else "replicated"


def weight_names(state: nnx.State) -> Any:
    """Names of the specs, as a nested dict, of an (abstract) `nnx.State` of tagged Params."""
    flat = {path: variable.get_metadata().get("spec", "replicated") for path, variable in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(flat)


def weight_specs(state: nnx.State) -> Any:
    """Partition specs, as a nested dict, for an (abstract) `nnx.State` of tagged Params."""

    def spec(name: str, weight: jax.Array) -> P:
        named = WEIGHTS[name]
        extra = weight.ndim - len(named) if named else 0
        return P(*(None,) * extra, *named)

    return jax.tree.map(spec, weight_names(state), nnx.to_pure_dict(state))


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    """The same tree with each spec bound to the mesh."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=_is_spec)


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of a batch over every axis but `tensor`."""
    return NamedSharding(mesh, P(BATCH))

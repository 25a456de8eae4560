"""A model's weights as decoding reads them: in the compute type, and each layer by itself.

A step of decoding reads every weight once and does little else, so whatever is done to the weights inside the loop
(a cast, a cut out of the stack of layers) would cost more than the step.
"""

import dataclasses
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from cm3jax.models.attention import Cache
from cm3jax.models.config import TransformerConfig
from cm3jax.models.transformer import Block, Transformer
from cm3jax.parallel.specs import INPUT_AXES, shardings, weight_specs

WeightKind = Literal["compute", "int8"]
AnyCache = TypeVar("AnyCache", bound=Cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A matrix in one byte a number; `weight[...]` gives the values, so that it stands in the place of a Param.

    Attributes:
      scale: of each output, the largest magnitude over 127.
    """

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Float[Array, "..."], inputs: tuple[int, ...], dtype: jnp.dtype) -> "Int8Weight":
        """Rounds a weight whose axes `inputs` are summed over when it is used."""
        scale = jnp.maximum(jnp.max(jnp.abs(weight), axis=inputs, keepdims=True), 1e-30) / 127
        return cls(jnp.round(weight / scale).astype(jnp.int8), scale, dtype)

    def __getitem__(self, key: Any) -> Float[Array, "..."]:
        return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)[key]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A transformer for decoding.

    Attributes:
      frame: the model without its blocks.
      unembedding: the output matrix in the compute type, or the rows of it that are asked for.
    """

    frame: Transformer
    blocks: tuple[Block, ...]
    unembedding: Float[Array, "V D"]

    @property
    def config(self) -> TransformerConfig:
        return self.frame.config

    def decode(
        self, tokens: Int[Array, "B T"], cache: AnyCache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], AnyCache]:
        """As `Transformer.decode`."""
        hidden, grown = self.frame.decode(tokens, cache, positions, self.blocks)
        return hidden, cast(AnyCache, grown)

    def restricted(self, ids: tuple[int, int]) -> "Decoder":
        """With logits of the ids in [first, end) of `ids` alone; to be done outside of a loop, since it copies."""
        return dataclasses.replace(self, unembedding=self.unembedding[ids[0] : ids[1]])

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next id, fp32."""
        return jnp.einsum("...d,vd->...v", hidden, self.unembedding, preferred_element_type=jnp.float32)


def prepare(graphdef: nnx.GraphDef, params: Any, mesh: jax.sharding.Mesh, kind: WeightKind = "compute") -> Decoder:
    """The weights of a `Transformer` (`params` as a nested dict), laid out on the mesh.

    Args:
      kind: "int8" rounds the matrices of the blocks to bytes.
    """
    abstract = nnx.state(nnx.eval_shape(lambda: nnx.merge(graphdef, params)))
    placed = jax.device_put(params, shardings(mesh, weight_specs(abstract)))

    @jax.jit
    def build(params: Any) -> Decoder:
        model = nnx.merge(graphdef, params)
        dtype = jnp.dtype(model.config.dtype)
        blocks = tuple(_in_compute_type(block, dtype, kind) for block in model.layers())
        unembedding = model.unembedding().astype(dtype)
        model.blocks = None
        model.head = None
        return Decoder(model, blocks, unembedding)

    with jax.set_mesh(mesh):
        return build(placed)


def _in_compute_type(block: Block, dtype: jnp.dtype, kind: WeightKind) -> Block:
    """Matrices alone: norms and biases are read in fp32."""

    def convert(param: Any) -> Any:
        name = param.get_metadata().get("spec", "replicated")
        if name not in INPUT_AXES:
            return param
        if kind == "int8":
            return Int8Weight.of(param[...], tuple(range(INPUT_AXES[name])), dtype)
        return param.replace(param[...].astype(dtype))

    return jax.tree.map(convert, block, is_leaf=lambda x: isinstance(x, nnx.Variable))

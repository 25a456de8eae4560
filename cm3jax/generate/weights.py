"""A model's weights as decoding reads them: in the compute type, each layer by itself, one row for each output.

A step of decoding reads every weight once and does little else, so whatever is done to the weights inside the loop
(a cast, a cut out of the stack of layers, a transposition) would cost more than the step.
"""

import dataclasses
import math
from typing import Any, Literal, Self, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from cm3jax.models.attention import Cache
from cm3jax.models.config import TransformerConfig
from cm3jax.models.layers import Rotation
from cm3jax.models.transformer import Block, Transformer
from cm3jax.parallel.specs import INPUT_AXES, shardings, weight_specs

WeightKind = Literal["compute", "int8"]
AnyCache = TypeVar("AnyCache", bound=Cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix with one row for each output, which `layers.project` takes in the place of a Param.

    Attributes:
      outputs: what the outputs' axis is cut into.
    """

    rows: Float[Array, "outputs inputs"]
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Float[Array, "..."], inputs: int) -> Self:
        """From a weight whose first axes, so many, are summed over when it is used."""
        flat = weight.reshape(math.prod(weight.shape[:inputs]), -1)
        return cls(flat.T, weight.shape[inputs:])

    def project(self, x: Float[Array, "N inputs"]) -> Float[Array, "N outputs"]:
        return product(x, self.rows, x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """The same in one byte a number.

    Attributes:
      scale: of each output, the largest magnitude over 127.
    """

    rows: Int8[Array, "outputs inputs"]
    scale: Float[Array, " outputs"]
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Float[Array, "..."], inputs: int) -> Self:
        """As `Matrix.of`."""
        exact = Matrix.of(weight, inputs)
        scale = jnp.maximum(jnp.max(jnp.abs(exact.rows), axis=1), 1e-30) / 127
        return cls(jnp.round(exact.rows / scale[:, None]).astype(jnp.int8), scale, exact.outputs)

    def project(self, x: Float[Array, "N inputs"]) -> Float[Array, "N outputs"]:
        return (product(x, self.rows.astype(x.dtype), jnp.float32) * self.scale).astype(x.dtype)


def product(x: Float[Array, "N I"], rows: Float[Array, "O I"], dtype: jnp.dtype) -> Float[Array, "N O"]:
    """x times the transpose of `rows`, in `dtype`.

    With few x, each row is read once from its first number to its last, which is what memory is fastest at.
    """

    def on_cpu(x: Float[Array, "N I"], rows: Float[Array, "O I"]) -> Float[Array, "N O"]:
        # Held, as XLA would make x @ rows.T of it, for which its CPU library has no fast path.
        held = jax.lax.optimization_barrier
        return held(jnp.matmul(rows, held(x.T), preferred_element_type=dtype)).T

    def elsewhere(x: Float[Array, "N I"], rows: Float[Array, "O I"]) -> Float[Array, "N O"]:
        return jnp.matmul(x, rows.T, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, rows, cpu=on_cpu, default=elsewhere)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A transformer for decoding.

    Attributes:
      frame: the model without its blocks.
      unembedding: the output matrix in the compute type, or the rows of it that are asked for.
      turns: the rotation at every position. It is looked up, since XLA computes cosines again for each head of each
        layer where they are computed in the step.
    """

    frame: Transformer
    blocks: tuple[Block, ...]
    unembedding: Float[Array, "V D"]
    turns: Rotation | None

    @property
    def config(self) -> TransformerConfig:
        return self.frame.config

    def decode(
        self, tokens: Int[Array, "B T"], cache: AnyCache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], AnyCache]:
        """As `Transformer.decode`."""
        turn = jax.tree.map(lambda table: table[0, positions], self.turns)
        hidden, grown = self.frame.decode(tokens, cache, positions, self.blocks, turn)
        return hidden, cast(AnyCache, grown)

    def restricted(self, ids: tuple[int, int]) -> "Decoder":
        """With logits of the ids in [first, end) of `ids` alone; to be done outside of a loop, since it copies."""
        return dataclasses.replace(self, unembedding=self.unembedding[ids[0] : ids[1]])

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next id, fp32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return product(flat, self.unembedding, jnp.float32).reshape(*hidden.shape[:-1], -1)


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
        blocks = tuple(_for_decoding(block, dtype, kind) for block in model.layers())
        unembedding = model.unembedding().astype(dtype)
        model.blocks = None
        model.head = None
        return Decoder(model, blocks, unembedding, model.rotation(jnp.arange(model.config.max_len)[None]))

    with jax.set_mesh(mesh):
        return build(placed)


def _for_decoding(block: Block, dtype: jnp.dtype, kind: WeightKind) -> Block:
    """Matrices alone: norms and biases are read in fp32."""

    def convert(param: Any) -> Any:
        name = param.get_metadata().get("spec", "replicated")
        if name not in INPUT_AXES:
            return param
        weight, inputs = param[...], INPUT_AXES[name]
        return Int8Matrix.of(weight, inputs) if kind == "int8" else Matrix.of(weight.astype(dtype), inputs)

    return jax.tree.map(convert, block, is_leaf=lambda x: isinstance(x, nnx.Variable))

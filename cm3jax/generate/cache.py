"""The static key-value cache: one array for the keys of all layers, one for the values."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cm3jax.models.config import TransformerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Slot s of a row holds the token at position s, so rows of unequal length need no shifting and no padding mask."""

    k: Float[Array, "layers B S G K"]
    v: Float[Array, "layers B S G K"]

    @classmethod
    def zeros(cls, config: TransformerConfig, rows: int, capacity: int) -> Self:
        """An empty cache of `capacity` slots a row, in the compute dtype."""
        shape = (config.n_layers, rows, capacity, config.n_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def append(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
        positions: Int[Array, "B T"],
    ) -> tuple[Self, Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        """Writes only the new slots, in place when the cache is donated; positions past the capacity are dropped."""
        rows = jnp.arange(k.shape[0])[:, None]
        grown = dataclasses.replace(
            self,
            k=self.k.at[layer, rows, positions].set(k, mode="drop"),
            v=self.v.at[layer, rows, positions].set(v, mode="drop"),
        )
        return grown, grown.k[layer], grown.v[layer]

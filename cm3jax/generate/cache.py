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
    """Slot s of a row holds the token at position s, so rows of unequal length need no shifting and no padding mask.

    Heads come before slots: what one head reads in a step is then contiguous.
    """

    k: Float[Array, "layers B G S K"]
    v: Float[Array, "layers B G S K"]

    @classmethod
    def zeros(cls, config: TransformerConfig, rows: int, capacity: int) -> Self:
        """An empty cache of `capacity` slots a row, in the compute dtype."""
        shape = (config.n_layers, rows, config.n_kv_heads, capacity, config.head_dim)
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
            k=self.k.at[layer, rows, :, positions].set(k, mode="drop"),
            v=self.v.at[layer, rows, :, positions].set(v, mode="drop"),
        )
        return grown, jnp.swapaxes(grown.k[layer], 1, 2), jnp.swapaxes(grown.v[layer], 1, 2)

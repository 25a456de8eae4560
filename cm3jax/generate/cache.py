"""The key-value cache: for each layer one array of keys and one of values, written in place.

A cache is attention's memory and so also says how a query reads it: `attend` is what the model calls.
"""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from cm3jax.kernels.attention import Mask
from cm3jax.models.config import TransformerConfig
from cm3jax.parallel.specs import constrain

CacheKind = Literal["compute", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Keys (or values) of one layer, in the compute type.

    Heads come before slots: what one head reads in a step is then contiguous.
    """

    values: Float[Array, "B G S K"]

    def write(self, new: Float[Array, "B T G K"], positions: Int[Array, "B T"]) -> Self:
        """Only the new slots are touched; positions past the capacity are dropped."""
        return dataclasses.replace(self, values=constrain(_put(self.values, new, positions), "cache"))

    def against(self, q: Float[Array, "B T G R K"]) -> Float[Array, "B G R T S"]:
        """Products of queries with all slots, fp32."""
        return jnp.einsum("btgrk,bgsk->bgrts", q, self.values, preferred_element_type=jnp.float32)

    def mixed(self, shares: Float[Array, "B G R T S"], dtype: jnp.dtype) -> Float[Array, "B T G R K"]:
        """The slots, weighted."""
        return _weighted(self.values, shares.astype(dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Slots:
    """The same in one byte a number, with one scale for each vector."""

    values: Int8[Array, "B G S K"]
    scales: Float[Array, "B G S"]

    def write(self, new: Float[Array, "B T G K"], positions: Int[Array, "B T"]) -> Self:
        scale = jnp.maximum(jnp.max(jnp.abs(new), axis=-1).astype(jnp.float32), 1e-30) / 127
        rounded = jnp.round(new.astype(jnp.float32) / scale[..., None]).astype(jnp.int8)
        return dataclasses.replace(
            self,
            values=constrain(_put(self.values, rounded, positions), "cache"),
            scales=_put(self.scales, scale, positions),
        )

    def against(self, q: Float[Array, "B T G R K"]) -> Float[Array, "B G R T S"]:
        products = jnp.einsum("btgrk,bgsk->bgrts", q, self.values.astype(q.dtype), preferred_element_type=jnp.float32)
        return products * self.scales[:, :, None, None]

    def mixed(self, shares: Float[Array, "B G R T S"], dtype: jnp.dtype) -> Float[Array, "B T G R K"]:
        scaled = (shares * self.scales[:, :, None, None]).astype(dtype)
        return _weighted(self.values.astype(dtype), scaled)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Slot s of a row holds the token at position s, so rows of unequal length need no shifting and no padding mask."""

    k: tuple[Slots | Int8Slots, ...]
    v: tuple[Slots | Int8Slots, ...]

    @classmethod
    def zeros(cls, config: TransformerConfig, rows: int, capacity: int, kind: CacheKind = "compute") -> Self:
        """An empty cache of `capacity` slots a row, in the compute type or in bytes."""
        shape = (rows, config.n_kv_heads, capacity, config.head_dim)

        def slots() -> Slots | Int8Slots:
            if kind == "int8":
                return Int8Slots(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1]))
            return Slots(jnp.zeros(shape, config.dtype))

        return cls(*(tuple(slots() for _ in range(config.n_layers)) for _ in "kv"))

    @property
    def capacity(self) -> int:
        return self.k[0].values.shape[2]

    def attend(
        self,
        layer: int,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
        positions: Int[Array, "B T"],
    ) -> tuple[Self, Float[Array, "B T H K"]]:
        """Writes k and v of one layer, then softmax(q k^T / sqrt(K)) v over the slots 0 .. position of each query."""
        keys, values = self.k[layer].write(k, positions), self.v[layer].write(v, positions)
        batch, new, heads, width = q.shape
        grouped = q.reshape(batch, new, k.shape[2], -1, width)
        scores = keys.against(grouped) * width**-0.5
        visible = Mask(positions).dense(new, self.capacity)[:, None, None]
        shares = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
        mixed = values.mixed(shares, q.dtype).reshape(batch, new, heads, width)
        return self._with(layer, keys, values), mixed

    def resized(self, capacity: int) -> Self:
        """The same rows with more slots, or with fewer: the last ones are cut."""

        def fit(x: Array) -> Array:
            kept = x[:, :, :capacity]
            missing = (*kept.shape[:2], capacity - kept.shape[2], *kept.shape[3:])
            # Joined rather than padded, which is three times as slow on CPUs.
            return jnp.concatenate([kept, jnp.zeros(missing, x.dtype)], axis=2)

        return jax.tree.map(fit, self)

    def filled(self, rows: Int[Array, " N"], source: Self, sources: Int[Array, " N"]) -> Self:
        """The rows `sources` of `source` copied into `rows`; row numbers past the end are dropped."""

        def copy(x: Array, new: Array) -> Array:
            width = min(new.shape[2], x.shape[2])
            return x.at[rows, :, :width].set(new[sources, :, :width], mode="drop")

        return jax.tree.map(copy, self, source)

    def _with(self, layer: int, k: Slots | Int8Slots, v: Slots | Int8Slots) -> Self:
        """With one layer exchanged."""
        return dataclasses.replace(
            self,
            k=(*self.k[:layer], k, *self.k[layer + 1 :]),
            v=(*self.v[:layer], v, *self.v[layer + 1 :]),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamCaches:
    """A cache for each stream of a batch, each as long as its own stream needs.

    The rows of the model's batch are the streams of the first request, then those of the second, and so on.
    """

    streams: tuple[KVCache, ...]

    def attend(
        self,
        layer: int,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
        positions: Int[Array, "B T"],
    ) -> tuple[Self, Float[Array, "B T H K"]]:
        """As `KVCache.attend`, each stream in its own cache."""
        count = len(self.streams)
        if count == 1:
            grown, mixed = self.streams[0].attend(layer, q, k, v, positions)
            return dataclasses.replace(self, streams=(grown,)), mixed
        found = [
            stream.attend(layer, q[i::count], k[i::count], v[i::count], positions[i::count])
            for i, stream in enumerate(self.streams)
        ]
        mixed = jnp.stack([mixed for _, mixed in found], axis=1).reshape(q.shape)
        return dataclasses.replace(self, streams=tuple(grown for grown, _ in found)), mixed


def _weighted(values: Float[Array, "B G S K"], shares: Float[Array, "B G R T S"]) -> Float[Array, "B T G R K"]:
    """Sums over the slots.

    The shares stand on the left of the product: on the right of it, the values of a single row are transposed in memory
    in each step on CPUs. A plain sum would depend on the number of rows, to the last bit.
    """
    mixed = jax.lax.dot_general(shares, values, (((4,), (2,)), ((0, 1), (0, 1))))
    return jnp.moveaxis(mixed, 3, 1)


def _put(slots: Array, new: Array, positions: Int[Array, "B T"]) -> Array:
    """`slots` [B, G, S, ...] with `new` [B, T, G, ...] at the positions of each row."""
    if positions.size == 1:
        # A scatter of one vector would become an update that the compiler repeats in what reads it, with four copies
        # of the slots in each step on CPUs. The second vector lies past the capacity and is dropped.
        new = jnp.concatenate([new, new], axis=1)
        positions = jnp.concatenate([positions, jnp.full_like(positions, slots.shape[2])], axis=1)
    rows = jnp.arange(new.shape[0])[:, None]
    return slots.at[rows, :, positions].set(new, mode="drop")

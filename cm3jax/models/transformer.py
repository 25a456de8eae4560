"""The decoder-only transformer: one block, stacked and scanned, for training and for decoding with a cache."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cm3jax.kernels.attention import Mask
from cm3jax.models.attention import Cache, SelfAttention
from cm3jax.models.config import TransformerConfig
from cm3jax.models.layers import FeedForward, Norm, Rotation, rotation, truncated_normal, weight
from cm3jax.models.remat import rematerialised
from cm3jax.parallel.specs import constrain


class Block(nnx.Module):
    """Attention and feed-forward, each a residual branch."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.pre = config.norm_order == "pre"
        self.attention_norm = Norm(config.norm, (config.d_model,), config.norm_eps)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = Norm(config.norm, (config.d_model,), config.norm_eps)
        self.mlp = FeedForward(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        turn: Rotation | None,
        cache: Cache | None,
        layer: int | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        if self.pre:
            branch, cache = self.attention(self.attention_norm(x), mask, turn, cache, layer)
            x = constrain(x + branch, "residual")
            return constrain(x + self.mlp(self.mlp_norm(x)), "residual"), cache
        branch, cache = self.attention(x, mask, turn, cache, layer)
        x = constrain(x + self.attention_norm(branch), "residual")
        return constrain(x + self.mlp_norm(self.mlp(x)), "residual"), cache


class Transformer(nnx.Module):
    """Token ids to hidden states; `logits` turns those into scores over the vocabulary.

    Weights of the blocks are stacked: every array under `blocks` has a leading axis of n_layers.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = weight(config, rngs, (config.vocab_size, config.d_model), "embedding")
        self.position_table = _position_table(config, rngs) if config.positions == "learned" else None
        self.blocks = nnx.vmap(lambda keys: Block(config, keys))(rngs.split(config.n_layers))
        self.norm = Norm(config.norm, (config.d_model,), config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else weight(config, rngs, (config.vocab_size, config.d_model), "embedding")

    def __call__(self, tokens: Int[Array, "B L"], segments: Int[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Hidden states after the final norm, in the compute dtype.

        Args:
          segments: tokens with different numbers are kept apart: none sees another's, and positions count the tokens
            with the same number.

        Raises:
          ValueError: more tokens than positions.
        """
        length, limit = tokens.shape[1], self.config.max_len
        if length > limit:
            raise ValueError(f"transformer: {length} tokens do not fit in max_len {limit}")
        positions = None if segments is None else positions_in(segments)
        x, turn = self._enter(tokens, positions)
        mask = Mask(segments=segments)

        def layer(x, block):
            return block(x, mask, turn, None, None)[0], None

        looped = self.config.scan_layers
        x, _ = jax.lax.scan(rematerialised(layer, self.config.remat, looped), x, self.blocks, unroll=not looped)
        return self.norm(x)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        positions: Int[Array, "B T"],
        blocks: Sequence[Block] | None = None,
        turn: Rotation | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of the next tokens of each row, whose keys and values join the cache.

        A row's slots are its positions: it must hold 0 .. p - 1 before position p is read. What lies in later slots
        is never seen, so a row padded on the right may leave anything there for the next call to overwrite.

        Args:
          blocks: the layers one by one. Cutting them out of the stack, which is done otherwise, copies every weight
            each time it is done.
          turn: the rotation at these positions, where it is known.
        """
        x, computed = self._enter(tokens, positions)
        turn, mask = turn or computed, Mask(positions)
        grown: Cache | None = cache
        for layer, block in enumerate(self.layers() if blocks is None else blocks):
            x, grown = block(x, mask, turn, grown, layer)
        assert grown is not None
        return self.norm(x), grown

    def layers(self) -> list[Block]:
        """The blocks, cut out of their stack."""
        return [jax.tree.map(lambda x, i=i: x[i], self.blocks) for i in range(self.config.n_layers)]

    def unembedding(self) -> Float[Array, "V D"]:
        """The output matrix, fp32: the embedding itself when tied."""
        return self.embedding[...] if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores over the whole vocabulary, fp32."""
        unembedding = self.unembedding().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type=jnp.float32)

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation | None:
        """Of queries and keys at `positions`, if that is how this model knows them."""
        if self.config.positions != "rope":
            return None
        return rotation(positions, self.config.head_dim, self.config.rope_theta)

    def _enter(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], Rotation | None]:
        """What goes into the first block, and the rotation for all of them."""
        x = constrain(self._embed(tokens, positions), "residual")
        return x, self.rotation(jnp.arange(tokens.shape[1])[None] if positions is None else positions)

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None) -> Float[Array, "B T D"]:
        # Rows of a sharded table cannot be looked up in place: gathering the table first is what the compiler would
        # otherwise do to the (larger) result.
        table = constrain(self.embedding[...], "embedding_lookup")
        x = table[tokens]
        if self.position_table is not None:
            places = constrain(self.position_table[...], "embedding_lookup")
            x = x + (places[: tokens.shape[1]] if positions is None else places[positions])
        return x.astype(self.config.dtype)


def _position_table(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Param:
    shape = (config.max_len, config.d_model)
    return nnx.Param(truncated_normal(rngs.params(), shape, config.position_std, config.init_cut), spec="positions")


def positions_in(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The place of each token among those with its number, from 0."""
    order = jnp.argsort(segments, axis=1, stable=True)
    numbers, places = jnp.take_along_axis(segments, order, axis=1), jnp.arange(segments.shape[1])
    begins = jnp.concatenate([jnp.ones_like(numbers[:, :1], bool), numbers[:, 1:] != numbers[:, :-1]], axis=1)
    within = places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return jnp.take_along_axis(within, jnp.argsort(order, axis=1), axis=1)

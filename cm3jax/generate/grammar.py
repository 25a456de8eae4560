"""Which ids may come next: text, or an image of exactly so many codes.

A row is in text, inside an image, or just after one:

    text ──<break>──► image (exactly `image_tokens` codes) ──► after ──<break>──► text

and is done at the first of its ending ids. The objective never masks an empty span, so the first id of an infill is
never an ending.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cm3jax.tokens.vocabulary import Vocabulary

TEXT, AFTER_IMAGE, INFILL = 0, -1, -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrammarState:
    """Attributes:
    phase: codes of the current image still to come, or TEXT, AFTER_IMAGE, INFILL (text that has not begun).
    done: an ending id was drawn; what follows is padding.
    """

    phase: Int[Array, " B"]
    done: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Attributes:
    image_tokens: codes of one image.
    endings: ids that end a row, allowed wherever text may end.
    """

    vocabulary: Vocabulary
    image_tokens: int
    endings: tuple[int, ...]

    def start(self, rows: int, phase: int) -> GrammarState:
        return GrammarState(jnp.full(rows, phase, jnp.int32), jnp.zeros(rows, bool))

    def allowed(self, state: GrammarState, ids: Int[Array, " V"]) -> Bool[Array, "B V"]:
        """For each row, which of `ids` may come next."""
        vocabulary = self.vocabulary
        ends = (ids == vocabulary.break_id) | jnp.isin(ids, jnp.asarray(self.endings, jnp.int32))
        phase = state.phase[:, None]
        in_text = ((phase == TEXT) & (vocabulary.is_text(ids) | ends)) | ((phase == INFILL) & vocabulary.is_text(ids))
        return in_text | ((phase > 0) & vocabulary.is_image(ids)) | ((phase == AFTER_IMAGE) & ends)

    def advance(self, state: GrammarState, tokens: Int[Array, " B"]) -> GrammarState:
        """The state after each row has drawn its token."""
        phase = state.phase
        opens = jnp.where(phase == TEXT, self.image_tokens, TEXT)
        outside = jnp.where(tokens == self.vocabulary.break_id, opens, jnp.where(phase == INFILL, TEXT, phase))
        inside = jnp.where(phase == 1, AFTER_IMAGE, phase - 1)
        ended = (phase <= 0) & jnp.isin(tokens, jnp.asarray(self.endings, jnp.int32))
        return GrammarState(jnp.where(phase > 0, inside, outside), state.done | ended)

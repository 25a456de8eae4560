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
    done: nothing more is drawn for this row.
    """

    phase: Int[Array, " B"]
    done: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Attributes:
    image_tokens: codes of one image.
    text_end: text ids from here on stand for nothing and are never drawn.
    """

    vocabulary: Vocabulary
    image_tokens: int
    text_end: int

    @property
    def marks(self) -> tuple[int, int, int]:
        """The ids that may end a row: `<break>`, `<eoss>`, `</s>`."""
        return self.vocabulary.break_id, self.vocabulary.eoss, self.vocabulary.eos

    def allowed(
        self, phase: Int[Array, " B"], endings: Bool[Array, "B 3"], ids: Int[Array, " V"]
    ) -> Bool[Array, "B V"]:
        """For each row, which of `ids` may come next.

        Args:
          endings: which of `marks` end the row; besides those a text and an image may end in `<break>`.
        """
        vocabulary = self.vocabulary
        ends = ids == vocabulary.break_id
        for mark, ending in zip(self.marks, endings.T, strict=True):
            ends = ends | (ending[:, None] & (ids == mark))
        text = vocabulary.is_text(ids) & (ids < self.text_end)
        phase = phase[:, None]
        in_text = ((phase == TEXT) & (text | ends)) | ((phase == INFILL) & text)
        return in_text | ((phase > 0) & vocabulary.is_image(ids)) | ((phase == AFTER_IMAGE) & ends)

    def advance(self, state: GrammarState, endings: Bool[Array, "B 3"], tokens: Int[Array, " B"]) -> GrammarState:
        """The state after each row has drawn its token."""
        phase = state.phase
        opens = jnp.where(phase == TEXT, self.image_tokens, TEXT)
        outside = jnp.where(tokens == self.vocabulary.break_id, opens, jnp.where(phase == INFILL, TEXT, phase))
        inside = jnp.where(phase == 1, AFTER_IMAGE, phase - 1)
        ending = jnp.any(endings & (tokens[:, None] == jnp.asarray(self.marks)), axis=-1)
        return GrammarState(jnp.where(phase > 0, inside, outside), state.done | ((phase <= 0) & ending))

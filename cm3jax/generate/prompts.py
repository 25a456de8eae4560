"""Prompts: the documents of pre-training, cut where the model is to go on.

An image follows its text: `</s> text <break>`. A text comes back as the infill of a hole: `</s> <sentinel:0> <break>
image </s> <sentinel:0>`, up to `<eoss>`. Retrieved documents stand before the query, each with its `<break>`.
"""

from collections.abc import Sequence

from cm3jax.tokens.vocabulary import Vocabulary

Ids = Sequence[int]


def text_to_image(vocabulary: Vocabulary, text: Ids, documents: Sequence[Ids] = ()) -> list[int]:
    """`</s> D1 <break> ... text <break>`: an image comes next."""
    return [*_context(vocabulary, documents), *text, vocabulary.break_id]


def unconditional_image(vocabulary: Vocabulary) -> list[int]:
    """`</s> <sentinel:0> <break>`: an image whose text is masked."""
    return text_to_image(vocabulary, [vocabulary.sentinel(0)])


def documents_only(vocabulary: Vocabulary, documents: Sequence[Ids]) -> list[int]:
    """`</s> D1 <break> ...`: the documents of `text_to_image` with its text dropped and no mask in its place."""
    return _context(vocabulary, documents)


def infill(vocabulary: Vocabulary, before: Ids, after: Ids, documents: Sequence[Ids] = ()) -> list[int]:
    """`</s> D1 <break> ... before <sentinel:0> after </s> <sentinel:0>`: what fills the hole comes next."""
    hole = vocabulary.sentinel(0)
    return [*_context(vocabulary, documents), *before, hole, *after, vocabulary.eos, hole]


def caption(vocabulary: Vocabulary, codes: Ids, documents: Sequence[Ids] = ()) -> list[int]:
    """The infill of a masked text before the image `codes`."""
    image = [vocabulary.image_id(code) for code in codes]
    return infill(vocabulary, [], [vocabulary.break_id, *image], documents)


def _context(vocabulary: Vocabulary, documents: Sequence[Ids]) -> list[int]:
    ids = [vocabulary.eos]
    for document in documents:
        ids += [*document, vocabulary.break_id]
    return ids

"""Documents with something missing, and the ids that ask the model for it.

A hole at the document's end is a continuation: `</s> text <break>`, and the image comes next. Any other is the infill
of the objective: `</s> before <sentinel:0> after </s> <sentinel:0>`, and what was there comes next, up to `<eoss>`;
then `<sentinel:1>` and what was in the second hole.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from cm3jax.generate.request import FREE
from cm3jax.tokens.document import Document, Image, Segment, Text, encode_document
from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary

Modality = Literal["text", "image"]


@dataclasses.dataclass(frozen=True)
class Hole:
    """A whole segment that is missing."""

    modality: Modality


@dataclasses.dataclass(frozen=True)
class GappedText:
    """A text of which phrases are missing: None in the place of each."""

    parts: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class GappedImage:
    """An image of which codes are missing.

    Attributes:
      codes: in raster order; what stands where `unknown` is True does not matter.
      span: False draws in raster order and sees only what is above; True takes the missing stretch out, from the first
        unknown code to the last, so that what is below is seen as well.
    """

    codes: Int[np.ndarray, " N"]
    unknown: Bool[np.ndarray, " N"]
    span: bool = False


HoledSegment = Segment | Hole | GappedText | GappedImage


@dataclasses.dataclass(frozen=True)
class Gap:
    """One thing to draw.

    Attributes:
      codes: of an image, how many.
      forced: ids that are known already, FREE elsewhere.
    """

    modality: Modality
    codes: int = 0
    forced: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Script:
    """A document's gaps in the order in which they are drawn.

    Attributes:
      prompt: after which the first gap is drawn.
      parts: the document's ids with its gaps in their places.
      joints: the ids between one gap's content and the next one's.
    """

    prompt: tuple[int, ...]
    parts: tuple[int | Gap, ...]
    joints: tuple[tuple[int, ...], ...]

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return tuple(part for part in self.parts if isinstance(part, Gap))

    def prompt_after(self, filled: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The ids after which the next gap is drawn, when the first ones are `filled`."""
        ids = list(self.prompt)
        for content, joint in zip(filled, self.joints, strict=False):
            ids += [*content, *joint]
        return tuple(ids)

    def longest(self, max_text: int) -> int:
        """Ids of the prompt and of all that follows it, at most, when a text has at most `max_text`."""
        drawn = sum(gap.codes if gap.modality == "image" else max_text for gap in self.gaps)
        return len(self.prompt) + drawn + sum(map(len, self.joints))

    def document(self, filled: Sequence[Sequence[int]]) -> list[int]:
        """The document's ids with every gap filled."""
        contents = iter(filled)
        ids: list[int] = []
        for part in self.parts:
            ids += next(contents) if isinstance(part, Gap) else [part]
        return ids


def modality_of(segment: HoledSegment) -> Modality:
    """Whether a segment is text or image, there or missing."""
    if isinstance(segment, Hole):
        return segment.modality
    return "text" if isinstance(segment, Text | GappedText) else "image"


def script(
    segments: Sequence[HoledSegment],
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    image_tokens: int,
    documents: Sequence[Sequence[int]] = (),
) -> Script:
    """What to draw, and after which ids.

    Args:
      documents: retrieved ones, as ids; each stands in front with its `<break>`.

    Raises:
      ValueError: nothing is missing, more is missing than there are sentinels, or a segment is no such thing.
    """
    parts: list[int | Gap] = []
    for number, segment in enumerate(segments):
        if number:
            parts.append(vocabulary.break_id)
        try:
            parts += _parts(segment, tokenizer, vocabulary, image_tokens)
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from error
    places = [place for place, part in enumerate(parts) if isinstance(part, Gap)]
    if not places:
        raise ValueError("the document has no hole: nothing to generate")
    if len(places) > vocabulary.sentinels:
        raise ValueError(f"{len(places)} holes, expected at most {vocabulary.sentinels}")
    context = [vocabulary.eos]
    for document in documents:
        context += [*document, vocabulary.break_id]
    if places == [len(parts) - 1]:
        return Script((*context, *_ids(parts[:-1])), tuple(parts), ())
    marked = list(parts)
    for number, place in enumerate(places):
        marked[place] = vocabulary.sentinel(number)
    prompt = (*context, *_ids(marked), vocabulary.eos, vocabulary.sentinel(0))
    joints = tuple((vocabulary.eoss, vocabulary.sentinel(number)) for number in range(1, len(places)))
    return Script(prompt, tuple(parts), joints)


def without(segments: Sequence[HoledSegment], modality: Modality) -> list[HoledSegment]:
    """The segments without what is known of one modality; holes stay."""
    kept: list[HoledSegment] = []
    for segment in segments:
        if isinstance(segment, GappedText) and modality == "text":
            kept.append(Hole("text"))
        elif not isinstance(segment, Text if modality == "text" else Image):
            kept.append(segment)
    return kept


def _parts(
    segment: HoledSegment, tokenizer: TextTokenizer, vocabulary: Vocabulary, image_tokens: int
) -> list[int | Gap]:
    if isinstance(segment, Hole):
        if segment.modality not in ("text", "image"):
            raise ValueError(f"unknown modality {segment.modality!r}, expected text or image")
        return [Gap(segment.modality, image_tokens if segment.modality == "image" else 0)]
    if isinstance(segment, GappedText):
        parts: list[int | Gap] = []
        for part in segment.parts:
            parts += [Gap("text")] if part is None else tokenizer.encode(part)
        return parts
    if isinstance(segment, GappedImage):
        return _image_parts(segment, vocabulary, image_tokens)
    if isinstance(segment, Text) and not segment.text:
        raise ValueError("an empty text")
    if isinstance(segment, Image) and segment.codes is not None and len(segment.codes) != image_tokens:
        raise ValueError(f"an image of {len(segment.codes)} codes, expected {image_tokens}")
    return encode_document(Document((segment,)), tokenizer, vocabulary).ids.tolist()


def _image_parts(image: GappedImage, vocabulary: Vocabulary, image_tokens: int) -> list[int | Gap]:
    if not len(image.codes) == len(image.unknown) == image_tokens:
        found = f"{len(image.codes)} codes and {len(image.unknown)} marks of unknown ones"
        raise ValueError(f"an image with {found}, expected {image_tokens} of both")
    places = np.flatnonzero(image.unknown)
    if not len(places):
        raise ValueError("an image with no unknown code: nothing to generate")
    ids = vocabulary.image_id(np.asarray(image.codes, np.int64))
    start, end = int(places[0]), int(places[-1]) + 1 if image.span else image_tokens
    forced = np.where(image.unknown, FREE, ids)[start:end]
    gap = Gap("image", end - start, tuple(forced.tolist()))
    return [*ids[:start].tolist(), gap, *ids[end:].tolist()]


def _ids(parts: Sequence[int | Gap]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]

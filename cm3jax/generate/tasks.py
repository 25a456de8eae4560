"""What a user asks for: a document with holes and how they are filled; and the usual documents."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from cm3jax.generate.guidance import ContrastiveTopK, Guidance, Scale, classifier_free, two_way
from cm3jax.generate.holes import GappedText, Hole, HoledSegment, Script, script, without
from cm3jax.generate.prompts import unconditional_image
from cm3jax.generate.request import Request
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.tokens.document import Image, Text
from cm3jax.tokens.text import TextTokenizer
from cm3jax.tokens.vocabulary import Vocabulary

EDIT = "Edit first image following the instruction"  # CM3Leon, arXiv 2309.02591, table 5


@dataclasses.dataclass(frozen=True)
class Steering:
    """How strongly what is drawn follows the document.

    Attributes:
      scale: classifier-free guidance weight, or a pair for the first and the last code of an image; 1 is none.
      image_scale: weight of the images where `scale` is that of the texts: two-way guidance, for editing.
      unconditional: what the stream without condition sees: "mask" in the place of the texts, or documents with the
        texts dropped ("drop"). A document that is filled in the middle always has them dropped.
      cdk: contrast in place of the weights.
    """

    scale: Scale = 1.0
    image_scale: Scale | None = None
    unconditional: Literal["mask", "drop"] = "mask"
    cdk: ContrastiveTopK | None = None

    def __post_init__(self):
        if self.cdk is not None and (self.scale != 1.0 or self.image_scale is not None):
            raise ValueError(f"cdk takes the place of guidance weights, found scale {self.scale} beside it")

    @property
    def guides(self) -> bool:
        return self.scale != 1.0 or self.image_scale is not None or self.cdk is not None

    def guidance(self) -> Guidance:
        if self.image_scale is not None:
            return two_way(self.image_scale, self.scale)
        return Guidance(contrast=self.cdk) if self.cdk is not None else classifier_free(self.scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Attributes:
    segments: the document; its holes are what is generated.
    seed: of the first sample; further ones have the seeds after it.
    max_text: ids of a missing text, at most.
    documents: retrieved ones, as ids; they stand in front.
    retrieve: documents that are looked up in the generator's memory, at most, and stand behind those.
    """

    segments: tuple[HoledSegment, ...]
    seed: int = 0
    steering: Steering = Steering()
    text: SamplingConfig = SamplingConfig()
    image: SamplingConfig = SamplingConfig()
    max_text: int = 64
    documents: tuple[tuple[int, ...], ...] = ()
    retrieve: int = 0


def text_to_image(prompt: str) -> tuple[HoledSegment, ...]:
    """A text, then an image that is missing."""
    return Text(prompt), Hole("image")


def caption(image: HoledSegment) -> tuple[HoledSegment, ...]:
    """A missing text before an image, as in pre-training."""
    return Hole("text"), image


def answer(question: str, image: HoledSegment) -> tuple[HoledSegment, ...]:
    """A question with its answer missing, before an image (CM3Leon, arXiv 2309.02591, table 5)."""
    return GappedText((f"Question: {question} Answer: ", None, ".")), image


def edit(image: HoledSegment, instruction: str) -> tuple[HoledSegment, ...]:
    """An image, an instruction, and the edited image, missing (CM3Leon, arXiv 2309.02591, table 5)."""
    return Text(EDIT), image, Text(instruction), Hole("image")


def infill(text: str, mark: str = "<mask>") -> GappedText:
    """A text whose phrases `<mask>` are missing."""
    pieces = text.split(mark)
    parts: list[str | None] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [None, piece]
    return GappedText(tuple(part for part in parts if part != ""))


def scripts(task: Task, tokenizer: TextTokenizer, vocabulary: Vocabulary, image_tokens: int) -> tuple[Script, ...]:
    """What each stream of a task sees, the conditional one first.

    Raises:
      ValueError: a document that cannot be asked for, or guidance by a stream that it does not have.
    """

    def script_of(segments: Sequence[HoledSegment], documents: Sequence[Sequence[int]]) -> Script:
        return script(segments, tokenizer, vocabulary, image_tokens, documents)

    full = script_of(task.segments, task.documents)
    steering = task.steering
    if not steering.guides:
        return (full,)
    told: Literal["text", "image"] = "text" if full.gaps[0].modality == "image" else "image"
    bare = without(task.segments, told)
    continues = not full.joints and full.parts[-1] is full.gaps[0]
    masked = continues and told == "text" and steering.unconditional == "mask"
    if steering.image_scale is not None:
        kept = _without_last_text(task.segments)
        pure = dataclasses.replace(full, prompt=tuple(unconditional_image(vocabulary)))
        return full, script_of(kept, task.documents), pure
    unconditional = script_of(bare, task.documents if not masked else ())
    if masked:
        known = unconditional.prompt[1:]
        unconditional = dataclasses.replace(full, prompt=(*unconditional_image(vocabulary), *known))
    return full, unconditional


def _without_last_text(segments: Sequence[HoledSegment]) -> list[HoledSegment]:
    texts = [place for place, segment in enumerate(segments) if isinstance(segment, Text)]
    images = [place for place, segment in enumerate(segments) if isinstance(segment, Image)]
    if not texts or not images:
        raise ValueError("two-way guidance needs an image and a text that says what becomes of it")
    return [segment for place, segment in enumerate(segments) if place != texts[-1]]


def request(task: Task, streams: Sequence[Script], filled: Sequence[Sequence[int]], seed: int, room: int) -> Request:
    """The engine's request for the next gap of a sample.

    Args:
      filled: the ids of the gaps before it.
      room: ids that the model can see, for prompt and new ids.
    """
    gap = streams[0].gaps[len(filled)]
    prompts = tuple(stream.prompt_after(filled) for stream in streams)
    longest = max(len(prompt) for prompt in prompts)
    return Request(
        streams=prompts,
        produce=gap.modality,
        seed=seed,
        max_new=gap.codes if gap.modality == "image" else max(1, min(task.max_text, room - longest)),
        text=task.text,
        image=task.image,
        guidance=task.steering.guidance() if task.steering.guides else Guidance(),
        forced=gap.forced,
    )

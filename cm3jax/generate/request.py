"""What is asked of the engine, and what comes back; both in ids."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32

from cm3jax.generate.grammar import INFILL, TEXT, Grammar
from cm3jax.generate.guidance import Guidance
from cm3jax.generate.sampler import SamplingConfig

Product = Literal["image", "text", "document"]
FREE = -1


@dataclasses.dataclass(frozen=True)
class Request:
    """Attributes:
    streams: the prompt of each stream, the conditional one first; all are fed what is drawn.
    produce: "image": so many codes; "text": up to `<break>`, `<eoss>` or `</s>`, at least one id; "document": text
      and whole images up to `</s>`, after a prompt that ends in text.
    max_new: at most so many new ids; of an image exactly so many, by default all its codes.
    text, image: how ids of each modality are drawn.
    forced: the n-th new id, FREE where it is drawn, as it is after the last one named here.
    """

    streams: tuple[tuple[int, ...], ...]
    produce: Product
    seed: int = 0
    max_new: int | None = None
    text: SamplingConfig = SamplingConfig()
    image: SamplingConfig = SamplingConfig()
    guidance: Guidance = Guidance()
    forced: tuple[int, ...] = ()

    def limit(self, grammar: Grammar) -> int:
        """The most ids that it can give."""
        return grammar.image_tokens if self.max_new is None else self.max_new

    def phase(self, grammar: Grammar) -> int:
        """Where the grammar begins."""
        return {"image": self.limit(grammar), "text": INFILL, "document": TEXT}[self.produce]

    def endings(self) -> tuple[bool, bool, bool]:
        """Which of `Grammar.marks` end it."""
        return {"image": (False,) * 3, "text": (True,) * 3, "document": (False, False, True)}[self.produce]


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """Attributes:
    ids: what was drawn or forced, without the ending id.
    log_probs: of each of `ids` (and the ending) given all before it in the conditional stream, among the ids that the
      grammar allows, at temperature 1 and without guidance: the model's own opinion.
    ended: by an ending id; False where `max_new` cut it.
    error: why there is nothing; None where all is well.
    """

    ids: list[int]
    log_probs: Float32[np.ndarray, " N"]
    ended: bool = False
    error: str | None = None

    @property
    def log_likelihood(self) -> float:
        """Of all that was drawn, natural logarithm."""
        return float(np.sum(self.log_probs, dtype=np.float64))


def refusal(request: Request, grammar: Grammar, max_len: int) -> str | None:
    """What is wrong with a request, in one line; None if nothing is."""
    for check in (_product, _prompts, _guidance, _forced):
        found = check(request, grammar, max_len)
        if found is not None:
            return found
    return None


def _product(request: Request, grammar: Grammar, max_len: int) -> str | None:
    if request.produce not in get_args(Product):
        return f"unknown modality {request.produce!r}, expected one of {', '.join(get_args(Product))}"
    if request.produce != "image" and request.max_new is None:
        return f"{request.produce}: max_new is missing, expected how many ids it may have at most"
    limit = request.limit(grammar)
    if limit < 1:
        return f"max_new must be >= 1, found {limit}"
    if request.produce == "image" and limit > grammar.image_tokens:
        return f"an image of {limit} codes, the model's images have {grammar.image_tokens}"
    if not 0 <= request.seed < 2**32:
        return f"seed {request.seed}, expected 0 <= seed < 2^32"
    return None


def _prompts(request: Request, grammar: Grammar, max_len: int) -> str | None:
    size, limit = grammar.vocabulary.size, request.limit(grammar)
    if not request.streams:
        return "no prompt: a request has at least one stream"
    for i, prompt in enumerate(request.streams):
        if not prompt:
            return f"the prompt of stream {i} is empty; a prompt begins with at least one id, such as </s>"
        if len(prompt) + limit > max_len:
            return f"the prompt of stream {i}, {len(prompt)} ids, leaves no room for {limit} new ones in {max_len}"
        if min(prompt) < 0 or max(prompt) >= size:
            bad = next(t for t in prompt if not 0 <= t < size)
            return f"the prompt of stream {i} holds id {bad}, expected 0 <= id < {size}"
    return None


def _guidance(request: Request, grammar: Grammar, max_len: int) -> str | None:
    wanted, found = request.guidance.streams, len(request.streams)
    if wanted > found:
        return f"guidance by stream {wanted - 1}, but the request has {found} (counted from 0)"
    last = request.guidance.last
    if last is not None and len(last) != len(request.guidance.weights):
        return f"guidance: {len(last)} weights at the last code for {len(request.guidance.weights)} at the first"
    return None


def _forced(request: Request, grammar: Grammar, max_len: int) -> str | None:
    limit = request.limit(grammar)
    if len(request.forced) > limit:
        return f"{len(request.forced)} forced ids for {limit} new ones"
    vocabulary = grammar.vocabulary
    for place, i in enumerate(request.forced):
        fits = vocabulary.is_image(i) if request.produce == "image" else 0 <= i < vocabulary.size
        if i != FREE and not fits:
            kind = "an image code's id" if request.produce == "image" else f"0 <= id < {vocabulary.size}"
            return f"forced id {i} at place {place}, expected {kind}"
    return None

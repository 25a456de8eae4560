"""Documents with holes in, whole documents out.

generator = Generator.from_run("runs/quickstart/decoder")
samples = generator.generate(text_to_image("one red dog on the grass at night"), n=4, steering=Steering(scale=3.0))
best = samples[0].document.segments[-1].pixels

With documents of a memory in front:

generator = Generator.from_run("runs/decoder", memory=Memory.load("embeddings/train"))
samples = generator.generate(text_to_image("one red dog on the grass at night"), n=4, retrieve=2)
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cm3jax.generate.context import Context, check_ids, contexts, model_scripts, refusal, with_documents
from cm3jax.generate.engine import USUAL, Engine, EngineConfig
from cm3jax.generate.holes import GappedImage, HoledSegment, Script
from cm3jax.generate.regions import unknown_codes, whole_rows
from cm3jax.generate.request import Completion
from cm3jax.generate.rerank import Scorer, best_first
from cm3jax.generate.tasks import Task, request
from cm3jax.generate.text_image import TextImageModel
from cm3jax.retrieval.memory import Memory
from cm3jax.tokens.document import Document, Image, Text, decode_document
from cm3jax.tokens.image import fit

Progress = Callable[[int, "Sample"], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Attributes:
    document: with every hole filled, pictures as pixels and codes; None where there was an error.
    gaps: what filled the holes: a text, or the codes of an image, in the order of the document.
    log_likelihood: of what was drawn, under the model without guidance; natural logarithm.
    score: by which samples are ranked: the log-likelihood, or what the scorer says.
    context: what was retrieved for it.
    """

    seed: int
    document: Document | None = None
    gaps: tuple[str | tuple[int, ...], ...] = ()
    log_likelihood: float = 0.0
    score: float = 0.0
    context: Context = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Draft:
    """A sample of which some gaps are filled."""

    place: int
    task: Task
    context: Context
    streams: tuple[Script, ...]
    seed: int
    filled: tuple[list[int], ...] = ()
    log_likelihood: float = 0.0


class Generator:
    """A decoder run with its tokenizers, as one that completes documents."""

    def __init__(self, model: TextImageModel, engine: Engine | None = None, memory: Memory | None = None):
        """`engine`: by default the model's own, on one device.

        Args:
          memory: what tasks may retrieve from.

        Raises:
          RetrievalError: the memory's ids are not the model's.
        """
        if memory is not None:
            check_ids(memory, model)
        self.model, self.memory = model, memory
        self.engine = engine or model.engine

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        step: int | None = None,
        config: EngineConfig = USUAL,
        mesh: jax.sharding.Mesh | None = None,
        memory: Memory | None = None,
    ) -> "Generator":
        """The newest checkpoint (or `step`) of an `lm` run; errors as of `TextImageModel.load` and the constructor."""
        model = TextImageModel.load(Path(run), step)
        return cls(model, model.make_engine(config, mesh), memory)

    def generate(
        self, segments: Sequence[HoledSegment], n: int = 1, scorer: Scorer | None = None, **settings: Any
    ) -> list[Sample]:
        """`n` samples of one document, best first; `settings` are the fields of `Task`.

        Raises:
          ValueError: a document that cannot be completed.
        """
        samples = self.complete([Task(tuple(segments), **settings)], n, scorer)[0]
        for sample in samples:
            if sample.error is not None:
                raise ValueError(f"generate: {sample.error}")
        return samples

    def complete(
        self,
        tasks: Sequence[Task],
        n: int = 1,
        scorer: Scorer | None = None,
        on_done: Progress | None = None,
    ) -> list[list[Sample]]:
        """`n` samples of each task, best first; where a task cannot be done, one sample with its `error`.

        Args:
          scorer: ranks in place of the log-likelihood.
          on_done: is told the place of the task and the sample, as soon as there is one.
        """
        samples: list[list[Sample]] = [[] for _ in tasks]

        def finish(place: int, sample: Sample) -> None:
            samples[place].append(sample)
            if on_done is not None:
                on_done(place, sample)

        drafts = self._drafts(tasks, n, finish)
        while drafts:
            drafts = self._one_gap_more(drafts, finish)
        return [ranked(found, scorer) for found in samples]

    def image(self, pixels: np.ndarray) -> Image:
        """A picture [H, W, 3] of any size as the segment of a document: the centre square, with its codes."""
        fitted = fit(pixels, self.model.image_tokenizer.config.resolution)
        return Image(fitted, self.model.image_tokenizer.encode(fitted[None])[0])

    def masked_image(self, pixels: np.ndarray, mask: np.ndarray, rows: bool = False) -> GappedImage:
        """A picture of which what the mask [H, W, 3] paints white is missing.

        Args:
          rows: draws whole rows of codes, with what is below them in view.

        Raises:
          ValueError: a mask of another size, or with nothing painted.
        """
        tokenizer = self.model.image_tokenizer
        unknown = unknown_codes(mask, pixels.shape[:2], tokenizer.config.resolution, tokenizer.image_tokens)
        codes = self.image(pixels).codes
        assert codes is not None
        return GappedImage(codes, whole_rows(unknown) if rows else unknown, span=rows)

    def _drafts(self, tasks: Sequence[Task], n: int, finish: Progress) -> list[_Draft]:
        """Beginnings of the samples of all tasks that can be done, with their documents in front."""
        good = []
        for place, task in enumerate(tasks):
            error = refusal(task, self.memory, self.model)
            if error is None:
                good.append((place, task))
            else:
                finish(place, Sample(task.seed, error=error))
        found = contexts([task for _, task in good], self.memory, self.model, self.engine.max_len)
        drafts = []
        for (place, task), context in zip(good, found, strict=True):
            streams = model_scripts(with_documents(task, context), self.model)
            drafts += [_Draft(place, task, context, streams, task.seed + i) for i in range(n)]
        return drafts

    def _one_gap_more(self, drafts: Sequence[_Draft], finish: Progress) -> list[_Draft]:
        """Fills the next gap of each draft; those that have more are given back."""
        room = self.engine.max_len
        requests = [request(draft.task, draft.streams, draft.filled, draft.seed, room) for draft in drafts]
        unfinished: list[_Draft] = []

        def done(number: int, completion: Completion) -> None:
            draft = drafts[number]
            if completion.error is not None:
                finish(draft.place, Sample(draft.seed, error=completion.error))
                return
            filled = (*draft.filled, completion.ids)
            likelihood = draft.log_likelihood + completion.log_likelihood
            grown = dataclasses.replace(draft, filled=filled, log_likelihood=likelihood)
            if len(filled) < len(draft.streams[0].gaps):
                unfinished.append(grown)
            else:
                finish(draft.place, self._sample(grown))

        self.engine.run(requests, done)
        return unfinished

    def _sample(self, draft: _Draft) -> Sample:
        model, layout = self.model, draft.streams[0]
        ids = np.array(layout.document(draft.filled))
        document = decode_document(ids, model.text_tokenizer, model.vocabulary, model.image_tokenizer.image_tokens)
        segments = tuple(self._with_pixels(segment) for segment in document.segments)
        gaps = tuple(
            model.text_tokenizer.decode(content)
            if gap.modality == "text"
            else tuple(model.vocabulary.image_code(i) for i in content)
            for gap, content in zip(layout.gaps, draft.filled, strict=True)
        )
        likelihood = draft.log_likelihood
        return Sample(draft.seed, Document(segments), gaps, likelihood, likelihood, draft.context)

    def _with_pixels(self, segment: Text | Image) -> Text | Image:
        if isinstance(segment, Text):
            return segment
        assert segment.codes is not None
        return Image(self.model.image_tokenizer.decode(segment.codes[None])[0], segment.codes)


def ranked(samples: Sequence[Sample], scorer: Scorer | None = None) -> list[Sample]:
    """Samples of one task, best first (equal ones by seed), those with an error behind; `scorer` gives new scores."""
    good = sorted((sample for sample in samples if sample.error is None), key=lambda sample: sample.seed)
    failed = [sample for sample in samples if sample.error is not None]
    if scorer is not None and good:
        scores = scorer([sample.document for sample in good if sample.document is not None])
        good = [dataclasses.replace(s, score=float(score)) for s, score in zip(good, scores, strict=True)]
    return [good[place] for place in best_first([sample.score for sample in good])] + failed

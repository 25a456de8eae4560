"""Retrieved documents in front of a task's own: looked up by what it says and shows, as many as there is room for.

They come as the ids of their records, so nothing is tokenised anew, and are framed as samples of training are:
`</s> T1 <break> I1 <break> ... Tq <break> Iq </s>`.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from cm3jax.generate.holes import GappedText, HoledSegment, Script
from cm3jax.generate.tasks import Task, scripts
from cm3jax.generate.text_image import TextImageModel
from cm3jax.retrieval.embeddings import RetrievalError
from cm3jax.retrieval.memory import Memory, Retrieved
from cm3jax.tokens.document import Document, Image, Segment, Text, decode_document, texts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class ContextDocument:
    """Attributes:
    texts: of the document.
    fits: whether it stands in front; False where the model has no room for it.
    """

    found: Retrieved
    texts: tuple[str, ...]
    fits: bool


Context = tuple[ContextDocument, ...]


def check_ids(memory: Memory, model: TextImageModel) -> None:
    """Compares the tokenizers of the memory's records with the model's.

    Raises:
      RetrievalError: the same ids would mean other things.
    """
    manifest = memory.records.manifest
    for what, found, expected in (
        ("vocabulary", manifest.vocabulary, model.vocabulary),
        ("text tokenizer", manifest.text_tokenizer, model.text_tokenizer.fingerprint),
        ("image tokenizer", manifest.image_tokenizer, model.image_tokenizer.fingerprint),
    ):
        if found != expected:
            raise RetrievalError(
                f"{memory.records.directory}: its {what} is {found}, the decoder's is {expected}; "
                "a memory's records are made with the decoder's tokenizers"
            )


def model_scripts(task: Task, model: TextImageModel) -> tuple[Script, ...]:
    """`tasks.scripts` in the model's ids."""
    return scripts(task, model.text_tokenizer, model.vocabulary, model.image_tokenizer.image_tokens)


def refusal(task: Task, memory: Memory | None, model: TextImageModel) -> str | None:
    """What is wrong with a task, in one line; None if nothing is."""
    try:
        model_scripts(task, model)
    except ValueError as error:
        return str(error)
    if task.retrieve < 0:
        return f"retrieve {task.retrieve}, expected >= 0"
    if not task.retrieve:
        return None
    if memory is None:
        return f"retrieve {task.retrieve}, but the generator has no memory"
    if not memory.understands(query(task.segments, model)):
        return f"retrieve {task.retrieve}, but the document has neither text nor whole picture to look up"
    return None


def query(segments: Sequence[HoledSegment], model: TextImageModel) -> Document:
    """What is known of a document: texts without their gaps, whole pictures (decoded where codes alone are known).

    A picture with a masked region is left out: what it shows is not what is wanted.
    """
    known: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Text):
            known.append(segment)
        elif isinstance(segment, GappedText):
            known.append(Text("".join(part for part in segment.parts if part is not None)))
        elif isinstance(segment, Image):
            known.append(segment if segment.pixels is not None else _decoded(segment, model))
    return Document(tuple(known))


def contexts(tasks: Sequence[Task], memory: Memory | None, model: TextImageModel, room: int) -> list[Context]:
    """What is retrieved for each task; tasks with the same segments are looked up once, all others together.

    Args:
      tasks: without those that `refusal` names.
      room: ids that the model can see.
    """
    asked = {_key(task): task for task in tasks if task.retrieve}
    answers: dict[tuple[int, int, int], Context] = {}
    for n in sorted({task.retrieve for task in asked.values()}):
        assert memory is not None
        keys = [key for key, task in asked.items() if task.retrieve == n]
        found = memory.retrieve_each([query(asked[key].segments, model) for key in keys], n)
        for key, documents in zip(keys, found, strict=True):
            answers[key] = _fitted(asked[key], documents, model, room)
    return [answers.get(_key(task), ()) for task in tasks]


def with_documents(task: Task, context: Context) -> Task:
    """The task with what stands in front of it."""
    return dataclasses.replace(
        task, documents=(*task.documents, *(document.found.ids for document in context if document.fits))
    )


def _key(task: Task) -> tuple[int, int, int]:
    """Of what decides on a task's context."""
    return id(task.segments), task.retrieve, task.max_text


def _fitted(task: Task, found: Sequence[Retrieved], model: TextImageModel, room: int) -> Context:
    """Marks which documents fit, the best first, with all that is drawn at its longest; says which do not."""
    # Every other stream has a part of this one's ids, or fewer in their place.
    length = model_scripts(task, model)[0].longest(task.max_text)
    context = []
    for document in found:
        with_break = len(document.ids) + 1
        fits = length + with_break <= room
        if fits:
            length += with_break
        else:
            logger.warning(
                "retrieved document %r is left out: %d ids and %d of the request are more than the model's %d",
                document.id,
                with_break,
                length,
                room,
            )
        context.append(ContextDocument(document, _texts(document, model), fits))
    return tuple(context)


def _texts(document: Retrieved, model: TextImageModel) -> tuple[str, ...]:
    ids = np.array(document.ids)
    image_tokens = model.image_tokenizer.image_tokens
    return tuple(texts(decode_document(ids, model.text_tokenizer, model.vocabulary, image_tokens)))


def _decoded(image: Image, model: TextImageModel) -> Image:
    assert image.codes is not None
    return Image(model.image_tokenizer.decode(np.asarray(image.codes)[None])[0], image.codes)

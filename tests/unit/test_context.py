"""Retrieved documents in front of a request, and ranking by CLIP."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from cm3jax import cli
from cm3jax.data.cm3 import invert
from cm3jax.data.framing import CLOSES, OPENS, framed_ids
from cm3jax.data.records import Records
from cm3jax.data.sources.folder import FolderSource
from cm3jax.data.tokenize import tokenize_source
from cm3jax.generate.context import contexts, model_scripts, with_documents
from cm3jax.generate.generator import Generator
from cm3jax.generate.rerank import clip_scorer
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.tasks import Steering, Task, answer, caption, infill, text_to_image
from cm3jax.loop import RunConfig
from cm3jax.models.clip import CLIP
from cm3jax.models.clip_config import CLIPConfig, TowerConfig
from cm3jax.parallel.mesh import one_device
from cm3jax.retrieval.embed import embed
from cm3jax.retrieval.embeddings import RetrievalError
from cm3jax.retrieval.encoder import DocumentEncoder
from cm3jax.retrieval.memory import Memory
from cm3jax.retrieval.select import SelectionConfig
from cm3jax.tasks.clip import CLIPTaskConfig
from cm3jax.tokens.captions import load_caption_tokenizer
from cm3jax.tokens.document import Document, Image, Text
from cm3jax.tokens.image import encode_png
from cm3jax.train import Config, train

TOWER = TowerConfig(16, 1, 2)
CLIP_SIZE = CLIPConfig(8, TOWER, TOWER, image_size=16, patch_size=8, vocab_size=300, context=16, end_id=2)
# An encoder that learnt nothing finds everything alike.
LOOSE = SelectionConfig(max_score=2.0, max_similarity=2.0)
SAMPLED = {"text": SamplingConfig(1.0), "image": SamplingConfig(1.0), "max_text": 6}
CAPTIONS = [f"{what} dog on the grass" for what in ("a", "a red", "the", "a red red", "on a", "the the")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures with captions."""
    folder, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for number, text in enumerate(CAPTIONS):
        pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        (folder / f"dog{number}.png").write_bytes(encode_png(pixels))
        (folder / f"dog{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def text_model(generator, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.model"
    path.write_bytes(generator.model.text_tokenizer.__reduce__()[1][0])
    return path


@pytest.fixture(scope="module")
def records(generator, folder, tmp_path_factory) -> Path:
    """The folder in the ids of the generator's tokenizers."""
    out, model = tmp_path_factory.mktemp("records") / "train", generator.model
    tokenize_source(
        FolderSource(folder),
        out,
        "train",
        model.image_tokenizer.encode,
        model.text_tokenizer,
        model.vocabulary,
        16,
        image_tokens=16,
        image_tokenizer=model.image_tokenizer.fingerprint,
        batch_size=2,
    )
    return out


@pytest.fixture(scope="module")
def encoder(text_model) -> DocumentEncoder:
    params = nnx.to_pure_dict(nnx.state(CLIP(CLIP_SIZE, nnx.Rngs(0))))
    return DocumentEncoder(CLIP_SIZE, params, load_caption_tokenizer(text_model, 16), one_device(), 4)


@pytest.fixture(scope="module")
def memory(records, folder, encoder, tmp_path_factory) -> Memory:
    out = tmp_path_factory.mktemp("embeddings")
    embed(Records(records), FolderSource(folder), encoder, out, query_dropout=0.2)
    return Memory.load(out, records=records, encoder=encoder, selection=LOOSE)


@pytest.fixture(scope="module")
def remembering(generator, memory) -> Generator:
    return Generator(generator.model, memory=memory)


def training_sample(documents, vocabulary):
    """The ids of a sample of training: the last document is the query."""
    last = len(documents) - 1
    frames = [OPENS * (place == 0) | CLOSES * (place == last) for place in range(last + 1)]
    return np.concatenate([framed_ids(ids, frame, vocabulary) for ids, frame in zip(documents, frames, strict=True)])


@pytest.mark.parametrize("kind", ["text to image", "caption", "question", "infill"])
def test_a_request_with_documents_is_a_sample_of_training_id_by_id(remembering, memory, picture, kind):
    model = remembering.model
    vocabulary, ids_of = model.vocabulary, model.text_tokenizer.encode
    segments, content, whole = {
        "text to image": (
            text_to_image("a dog"),
            vocabulary.image_id(picture.codes).tolist(),
            (Text("a dog"), picture),
        ),
        "caption": (caption(picture), ids_of("a dog"), (Text("a dog"), picture)),
        "question": (
            answer("what?", picture),
            ids_of("a dog"),
            (Text("Question: what? Answer: "), Text("a dog"), Text("."), picture),
        ),
        "infill": ((infill("a <mask> dog"),), ids_of("red"), (Text("a "), Text("red"), Text(" dog"))),
    }[kind]
    task = Task(segments, retrieve=2, **SAMPLED)
    (context,) = contexts([task], memory, model, remembering.engine.max_len)
    assert [document.fits for document in context] == [True, True]
    script = model_scripts(with_documents(task, context), model)[0]
    ending = [vocabulary.eos] if kind == "text to image" else [vocabulary.eoss]
    completed = invert(np.array([*script.prompt, *content, *ending]), vocabulary)
    texts = [segment for segment in whole if isinstance(segment, Text)]
    query = np.concatenate([ids_of(text.text) for text in texts])
    if picture in whole:
        query = np.concatenate([query, [vocabulary.break_id], vocabulary.image_id(picture.codes)])
    retrieved = [memory.records[document.found.record].ids for document in context]
    np.testing.assert_array_equal(completed, training_sample([*retrieved, query], vocabulary))


def test_documents_change_what_is_drawn_and_the_sample_tells_of_them(generator, remembering, memory):
    settings = {"seed": 3, "steering": Steering(2.0), **SAMPLED}
    sample = remembering.generate(text_to_image("a red dog"), retrieve=2, **settings)[0]
    found = memory.retrieve(Document((Text("a red dog"),)), 2)
    assert [vars(document.found) for document in sample.context] == [vars(document) for document in found]
    assert [document.texts for document in sample.context] == [(CAPTIONS[d.record],) for d in found]
    plain = remembering.generate(text_to_image("a red dog"), **settings)[0]
    assert plain.context == () and plain.gaps != sample.gaps
    given = tuple(document.ids for document in found)
    same = generator.generate(text_to_image("a red dog"), documents=given, **settings)[0]
    assert same.gaps == sample.gaps and same.log_likelihood == sample.log_likelihood


def test_retrieval_and_samples_do_not_depend_on_the_batch(remembering, picture):
    tasks = [
        Task(text_to_image("a dog"), seed=1, retrieve=2, **SAMPLED),
        Task(caption(picture), seed=2, retrieve=1, **SAMPLED),
        Task((infill("the <mask> dog"),), seed=3, **SAMPLED),
        Task(text_to_image("the grass"), seed=4, retrieve=2, **SAMPLED),
    ]
    together = [found[0] for found in remembering.complete(tasks)]
    assert [len(sample.context) for sample in together] == [2, 1, 0, 2]
    for place in (0, 1):
        alone = remembering.complete([tasks[place]])[0][0]
        assert alone.gaps == together[place].gaps
        assert [vars(d.found) for d in alone.context] == [vars(d.found) for d in together[place].context]


def test_documents_that_have_no_room_are_left_out_and_told_of(remembering, caplog):
    sample = remembering.generate(text_to_image("a dog"), retrieve=6, **SAMPLED)[0]
    fits = [document.fits for document in sample.context]
    assert len(fits) == 6 and 2 <= sum(fits) < 6
    room = remembering.engine.max_len
    used = [len(document.found.ids) + 1 for document in sample.context if document.fits]
    request = 1 + len(remembering.model.text_tokenizer.encode("a dog")) + 1 + 16
    assert request + sum(used) <= room < request + sum(used) + min(len(d.found.ids) + 1 for d in sample.context)
    left_out = [document.found.id for document in sample.context if not document.fits]
    assert len(caplog.records) == len(left_out)
    assert all(f"retrieved document {name!r} is left out" in caplog.text for name in left_out)


def test_no_memory_or_nothing_to_look_up_is_an_error_of_the_task_alone(generator, remembering, picture):
    tasks = [Task(text_to_image("a dog"), retrieve=1, **SAMPLED), Task(caption(picture), **SAMPLED)]
    refused, good = generator.complete(tasks)
    assert refused[0].error == "retrieve 1, but the generator has no memory" and good[0].error is None
    mask = np.full((16, 16, 3), 255, np.uint8)
    masked = remembering.masked_image(picture.pixels, mask)
    with pytest.raises(ValueError, match="neither text nor whole picture to look up"):
        remembering.generate((masked,), retrieve=1, **SAMPLED)
    with pytest.raises(ValueError, match="retrieve -1, expected >= 0"):
        remembering.generate(text_to_image("a dog"), retrieve=-1, **SAMPLED)


def test_a_picture_known_by_its_codes_is_looked_up_by_what_they_show(remembering, picture):
    codes = Image(codes=picture.codes)
    decoded = remembering.model.image_tokenizer.decode(picture.codes[None])[0]
    by_codes = remembering.generate(caption(codes), retrieve=2, **SAMPLED)[0]
    by_pixels = remembering.generate(caption(Image(decoded, picture.codes)), retrieve=2, **SAMPLED)[0]
    assert [vars(d.found) for d in by_codes.context] == [vars(d.found) for d in by_pixels.context]


@pytest.mark.parametrize("what", ["vocabulary", "text tokenizer", "image tokenizer"])
def test_a_memory_of_other_tokenizers_is_refused(generator, memory, monkeypatch, what):
    model, manifest = generator.model, memory.records.manifest
    field = what.replace(" ", "_")
    other = dataclasses.replace(model.vocabulary, sentinels=3) if what == "vocabulary" else "another"
    monkeypatch.setattr(memory.records, "manifest", dataclasses.replace(manifest, **{field: other}))
    with pytest.raises(
        RetrievalError, match=f"its {what} is .*, the decoder's is .*made with the decoder's tokenizers"
    ):
        Generator(model, memory=memory)


def cosine(encoder, document):
    text, image = document.segments
    (said,), (shown,) = encoder.texts(encoder.tokenizer([text.text])), encoder.images(image.pixels[None])
    return float(said @ shown)


def test_clip_ranks_and_the_likelihoods_stay(generator, encoder):
    prompt = text_to_image("a red dog")
    ranked = generator.generate(prompt, n=4, scorer=clip_scorer(encoder), **SAMPLED)
    np.testing.assert_allclose([s.score for s in ranked], [cosine(encoder, s.document) for s in ranked], atol=1e-6)
    assert [s.score for s in ranked] == sorted((s.score for s in ranked), reverse=True)
    plain = {sample.seed: sample.log_likelihood for sample in generator.generate(prompt, n=4, **SAMPLED)}
    assert {sample.seed: sample.log_likelihood for sample in ranked} == plain
    assert [sample.seed for sample in ranked] != sorted(plain, key=lambda seed: -plain[seed])


def test_clip_takes_the_mean_over_pictures_and_needs_text_and_picture(encoder, picture):
    other = Image(255 - picture.pixels)
    one, two = Document((Text("a dog"), picture)), Document((Text("a dog"), other))
    both = Document((picture, Text("a dog"), other))
    first, second, mean = clip_scorer(encoder)([one, two, both])
    assert mean == pytest.approx((first + second) / 2, abs=1e-6) and first != second
    with pytest.raises(ValueError, match="clip score: document 1 has 1 texts and 0 pictures"):
        clip_scorer(encoder)([one, Document((Text("a dog"),))])


@pytest.fixture(scope="module")
def embedded(records, folder, text_model, tmp_path_factory) -> Path:
    """By commands: an encoder's run, and embeddings by it."""
    base = tmp_path_factory.mktemp("by_command")
    clip = CLIPTaskConfig(
        model=CLIP_SIZE, tokenizer=str(text_model), source="scenes:count=8,size=16", batch_size=8, valid_pairs=8
    )
    train(Config(task="clip", run=RunConfig(steps=1), clip=clip), base / "clip")
    words = ("--records", records, "--source", f"folder:{folder}", "--encoder", base / "clip", "--batch-size", 8)
    assert cli.main(["retrieval", "embed", *map(str, words), "--out", str(base / "embeddings")]) == 0
    return base


LOOSELY = ("--max-score", 2, "--max-similarity", 2)


def test_the_command_retrieves_and_reranks_with_the_memory_and_its_encoder(cm3, embedded, tmp_path, capsys):
    words = ("--retrieve", 2, "--memory", embedded / "embeddings", *LOOSELY)
    drawn = ("--prompt", "a red dog", "--out", "new.png", "--n", 3, "--keep", 1, "--rerank", "clip")
    assert cm3(*drawn, *words) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["new.png"] and "2 of 2 documents in front" in printed.err
    told = json.loads((tmp_path / "new.json").read_text())
    assert len(told["retrieved"]) == 2 and all(document["in_front"] for document in told["retrieved"])
    for document in told["retrieved"]:
        number = int(document["id"].removeprefix("dog"))
        assert document["texts"] == [CAPTIONS[number]]
        assert f"{document['score']:.4f} 'dog{number}' '{CAPTIONS[number]}'" in printed.err
    scores = [candidate["score"] for candidate in told["candidates"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and -1 <= scores[-1] <= scores[0] <= 1
    assert all(candidate["log_likelihood"] < -1 for candidate in told["candidates"])
    assert [candidate["pictures"] for candidate in told["candidates"]] == [["new.png"], [], []]
    for about in (("--image", "dog.png", "--caption"), ("--image", "dog.png", "--question", "what?")):
        assert cm3(*about, *words) == 0
        assert "2 of 2 documents in front" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sample: --rerank clip compares text with picture, the document has text"):
        cm3("--infill", "a <mask> dog", "--rerank", "clip", "--encoder", embedded / "clip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--retrieve", 2), "--retrieve N (at least 1) and --memory DIR go together"),
        (("--memory", "x"), "--retrieve N (at least 1) and --memory DIR go together"),
        (("--retrieve", 0, "--memory", "x"), "--retrieve N (at least 1) and --memory DIR go together"),
        (("--rerank", "clip"), "--rerank clip needs an --encoder, or the one of a --memory"),
    ],
)
def test_words_of_retrieval_that_do_not_go_together_are_refused(cm3, capsys, words, message):
    with pytest.raises(SystemExit):
        cm3("--prompt", "a dog", "--out", "x.png", *words)
    assert message in capsys.readouterr().err

"""Documents for requests: the memory, its rules, and what it refuses."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cm3jax.data.records import Records
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.retrieval.embed import embed
from cm3jax.retrieval.embeddings import Embeddings, RetrievalError
from cm3jax.retrieval.memory import Memory
from cm3jax.retrieval.places import Places, read_places, write_places
from cm3jax.retrieval.select import SelectionConfig
from cm3jax.tokens.document import Document, Text

JOB = Path(__file__).parents[1] / "jobs" / "neighbours.py"
spec = importlib.util.spec_from_file_location("neighbours_job", JOB)
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)

# An encoder that learnt nothing finds everything alike.
LOOSE = SelectionConfig(max_score=2.0, max_similarity=2.0)


@pytest.fixture(scope="module")
def source():
    return ScenesSource("train", 48, 32)


@pytest.fixture(scope="module")
def encoder(scene_records):
    return job.small_encoder(scene_records / "text.model")


@pytest.fixture(scope="module")
def embedded(scene_records, source, encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("embedded")
    embed(Records(scene_records / "train"), source, encoder, out, query_dropout=0.2)
    return out


@pytest.fixture(scope="module")
def load(embedded, scene_records, encoder):
    def load(**settings):
        return Memory.load(embedded, **{"records": scene_records / "train", "encoder": encoder, **settings})

    return load


@pytest.fixture(scope="module")
def vectors(embedded):
    return np.concatenate(Embeddings(embedded).shards)["document"]


def test_what_is_found_by_a_text_is_the_nearest_documents_with_their_ids(load, vectors, encoder, scene_records):
    words = "two blue squares"
    found = load(selection=LOOSE).retrieve(Document((Text(words),)), 3)
    scores = vectors @ encoder.texts(encoder.tokenizer([words]))[0]
    order = np.argsort(-scores)[:3]
    assert [document.record for document in found] == order.tolist()
    np.testing.assert_allclose([document.score for document in found], scores[order], atol=1e-6)
    records = Records(scene_records / "train")
    for document in found:
        assert document.ids == tuple(records[document.record].ids.tolist())
        assert document.id == records[document.record].id


def test_picture_and_text_of_a_query_take_turns(load, vectors, encoder, source):
    document = Document((Text("two blue squares"), source[5].segments[1]))
    images, texts = encoder.parts([document])
    found = load(selection=LOOSE).retrieve(document, 3)
    by_image, by_text = np.argsort(-(vectors @ images[0])), np.argsort(-(vectors @ texts[0]))
    assert found[0].record == by_image[0]
    assert found[1].record == next(row for row in by_text if row not in by_image[:3])
    assert found[2].record == by_image[1]


def test_a_near_duplicate_of_the_query_or_of_one_taken_is_passed_over(load, vectors, source):
    query = Document((Text(source[5].segments[0].text), source[5].segments[1]))
    every = load(selection=LOOSE).retrieve(query, 48)
    assert {document.record for document in every} == set(range(48)), "the query itself is in the memory"
    most = float(np.median(vectors @ vectors.T))
    found = [row.record for row in load(selection=dataclasses.replace(LOOSE, max_similarity=most)).retrieve(query, 48)]
    assert 5 not in found and 1 < len(found) < 24
    likeness = vectors[[5, *found]] @ vectors[[5, *found]].T - 2 * np.eye(len(found) + 1)
    assert likeness.max() <= most + 1e-6
    highest = max(document.score for document in every)
    rules = dataclasses.replace(LOOSE, max_score=highest - 1e-4)
    assert all(document.score < highest - 1e-4 for document in load(selection=rules).retrieve(query, 48))


def test_fewer_are_found_where_the_rules_leave_fewer(load):
    rules = dataclasses.replace(LOOSE, min_score=2.0)
    assert load(selection=rules).retrieve(Document((Text("a dog"),)), 2) == []


def test_a_query_finds_the_same_in_any_company(load, source):
    memory = load(selection=LOOSE)
    queries = [Document((source[i].segments[i % 2],)) for i in range(11)]
    together = memory.retrieve_each(queries, 2)
    for query, found in zip(queries, together, strict=True):
        assert list(map(vars, memory.retrieve(query, 2))) == list(map(vars, found))


def test_an_empty_query_and_no_documents_are_refused(load, source):
    with pytest.raises(ValueError, match="query 1 has neither text nor picture"):
        load().retrieve_each([source[0], Document((Text(""),))], 1)
    with pytest.raises(ValueError, match="0 documents, expected at least 1"):
        load().retrieve(source[0], 0)


def test_other_records_or_another_encoder_are_refused(load, scene_records):
    with pytest.raises(RetrievalError, match=r"made from \w+, the records .*valid has the fingerprint"):
        load(records=scene_records / "valid")
    other = job.small_encoder(scene_records / "text.model")
    other.fingerprint = "another"
    with pytest.raises(RetrievalError, match="the encoder has the fingerprint another"):
        load(encoder=other)
    with pytest.raises(RetrievalError, match=r"no .*places.json: name the records and the encoder"):
        load(records=None)


def test_places_follow_when_everything_is_moved(tmp_path):
    places = Places(str(tmp_path / "a" / "records"), str(tmp_path / "b.safetensors"), "vit-b-32", str(tmp_path / "t"))
    (tmp_path / "a" / "embeddings").mkdir(parents=True)
    write_places(tmp_path / "a" / "embeddings", places)
    moved = tmp_path / "moved"
    (tmp_path / "a").rename(moved)
    found = read_places(moved / "embeddings")
    assert Path(found.records).resolve() == moved / "records" and found.size == "vit-b-32"
    assert Path(found.encoder).resolve() == tmp_path / "b.safetensors"
    (moved / "embeddings" / "places.json").write_text("{}")
    with pytest.raises(RetrievalError, match="damaged .*places.json"):
        read_places(moved / "embeddings")

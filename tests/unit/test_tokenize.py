"""Tokenizing a source: exact records, refused documents, and a job that survives being killed."""

import json
import pathlib

import numpy as np
import pytest

from cm3jax.data.records import Records
from cm3jax.data.rejects import TooManyRejectsError
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Reason, RejectError, check_index
from cm3jax.data.tokenize import tokenize_source
from cm3jax.data.tokenize_documents import TokenizeError
from cm3jax.tokens.document import IMAGE, Document, Image, Text, decode_document
from cm3jax.tokens.text import TextTokenizer, train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=320, image_size=256, sentinels=8, size=600)
SIZE, TOKENS = 8, 4


def encode_images(images: np.ndarray) -> np.ndarray:
    """Codes of a picture: its own corners, so a mix-up of pictures shows."""
    assert images.shape[1:] == (SIZE, SIZE, 3) and len(images) <= 3
    return images[:, [0, 0, -1, -1], [0, -1, 0, -1], 0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return train_text_tokenizer(["picture number 1 2 3"] * 5, 300, tmp_path_factory.mktemp("text") / "text.model")


class Made:
    """Documents in memory; an `Exception` in the list is raised."""

    name = "made"

    def __init__(self, documents: list[Document | Exception]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        check_index(index, len(self))
        document = self.documents[index]
        if isinstance(document, Exception):
            raise document
        return document

    def fingerprint(self) -> str:
        return f"made{len(self)}"


def picture(seed: int) -> Image:
    return Image(pixels=np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def documents(count: int) -> list[Document | Exception]:
    return [Document((Text(f"picture number {i}"), picture(i)), id=f"d{i}") for i in range(count)]


def run(source, out, tokenizer, **changes):
    arguments = {
        "split": "train", "encode_images": encode_images, "vocabulary": VOCABULARY, "image_size": SIZE,
        "image_tokens": TOKENS, "image_tokenizer": "corners", "shard_documents": 4, "batch_size": 3,
    } | changes  # fmt: skip
    return tokenize_source(source, out, tokenizer=tokenizer, **arguments)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_are_the_documents(tmp_path, tokenizer):
    source = Made(documents(10))
    manifest = run(source, tmp_path, tokenizer)
    records = Records(tmp_path)
    assert (manifest.shards, manifest.records, len(records), manifest.rejects) == (3, 10, 10, 0)
    assert manifest.tokens == records.lengths.sum() and records.image_tokens == TOKENS
    for i in range(10):
        text, image = decode_document(records[i].ids, tokenizer, VOCABULARY, TOKENS).segments
        assert (records[i].id, records[i].index, text) == (f"d{i}", i, Text(f"picture number {i}"))
        np.testing.assert_array_equal(image.codes, encode_images(source[i].segments[1].pixels[None])[0])
    assert (tmp_path / "rejects.jsonl").read_bytes() == b""


def test_several_pictures_and_texts_and_ready_codes(tmp_path, tokenizer):
    codes = Image(codes=np.array([9, 8, 7, 255]))
    segments = (picture(0), Text("between"), picture(1), codes, picture(2), Text(""), picture(3))
    source = Made([Document((Text("only text"),)), Document(segments, id="many")])
    run(source, tmp_path, tokenizer)
    records = Records(tmp_path)
    assert records[0].id == "0"
    found = decode_document(records[1].ids, tokenizer, VOCABULARY, TOKENS).segments
    for written, read in zip(segments, found, strict=True):
        if isinstance(written, Text):
            assert read == written
        else:
            wanted = encode_images(written.pixels[None])[0] if written.codes is None else written.codes
            np.testing.assert_array_equal(read.codes, wanted)
    assert (records[1].segments[:, 2] == IMAGE).tolist() == [True, False, True, True, True, False, True]


def test_pictures_are_fitted(tmp_path, tokenizer):
    wide = Image(pixels=np.full((20, 50, 3), 77, np.uint8))
    run(Made([Document((Text("wide"), wide))]), tmp_path, tokenizer)
    assert VOCABULARY.image_code(Records(tmp_path)[0].ids[-TOKENS:].astype(int)).tolist() == [77] * TOKENS


def broken(count: int) -> list[Document | Exception]:
    """Five of `count` documents that must be refused, each for its own reason; the repeated id in another shard."""
    made = documents(count)
    made[1] = RejectError(Reason.BROKEN_IMAGE, "cut short", "d1")
    made[2] = Document((Text("bad codes"), Image(codes=np.array([1, 2, 3, 256]))), id="d2")
    made[3] = Document((Text("few codes"), Image(codes=np.array([1]))), id="d3")
    made[6] = Document((), id="d6")
    made[9] = Document((Text("again"),), id="d0")
    made[10] = Document((Text("the first d2 was refused, so this one is not"),), id="d2")
    return made


def test_refused_documents_are_logged_and_left_out(tmp_path, tokenizer):
    manifest = run(Made(broken(12)), tmp_path, tokenizer, max_reject_share=0.5)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["index"], r["key"], r["reason"]) for r in rejects] == [
        (1, "d1", "broken_image"), (2, "d2", "malformed"), (3, "d3", "malformed"), (6, "d6", "malformed"),
        (9, "d0", "duplicate_id"),
    ]  # fmt: skip
    assert rejects[0]["detail"] == "cut short"
    records = Records(tmp_path)
    assert [records[i].index for i in range(len(records))] == [0, 4, 5, 7, 8, 10, 11]
    assert manifest.rejects == 5


def test_too_many_refused_documents_stop_the_job(tmp_path, tokenizer):
    with pytest.raises(TooManyRejectsError, match="3 documents of 12 refused, allowed are 2; see .*rejects.jsonl"):
        run(Made(broken(12)), tmp_path, tokenizer, max_reject_share=0.17)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "manifest.json").exists()
    assert run(Made(broken(12)), tmp_path, tokenizer, max_reject_share=0.5).records == 7


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at_call", [1, 3, 5])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, tokenizer, kill_at_call):
    calls = []

    def fragile(images):
        calls.append(len(images))
        if len(calls) == kill_at_call:
            raise Killed
        return encode_images(images)

    source = Made(broken(19))
    run(source, tmp_path / "whole", tokenizer, max_reject_share=0.5)
    with pytest.raises(Killed):
        run(source, tmp_path / "killed", tokenizer, max_reject_share=0.5, encode_images=fragile)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done = sum(name.startswith("index") for name in files(tmp_path / "killed"))
    run(source, tmp_path / "killed", tokenizer, max_reject_share=0.5, workers=1)
    assert done == {1: 0, 3: 2, 5: 3}[kill_at_call]  # the fifth call is in the middle of shard 3
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_finished_job_encodes_nothing_again(tmp_path, tokenizer):
    run(Made(documents(6)), tmp_path, tokenizer)
    before = files(tmp_path)

    def refuse(images):
        raise Killed

    run(Made(documents(6)), tmp_path, tokenizer, encode_images=refuse)
    assert files(tmp_path) == before


def test_a_damaged_shard_is_written_again(tmp_path, tokenizer, caplog):
    run(Made(documents(6)), tmp_path, tokenizer)
    before = files(tmp_path)
    (tmp_path / "records-train.array_record-00001-of-00002").write_bytes(b"cut")
    run(Made(documents(6)), tmp_path, tokenizer)
    assert files(tmp_path) == before
    assert "shard 1 is written again: damaged shard" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_tokenizer": "other"}, "image_tokenizer 'corners', now 'other'"),
        ({"shard_documents": 5}, "shard_documents 4, now 5"),
        ({"split": "valid"}, "split 'train', now 'valid'"),
    ],
)
def test_other_settings_in_the_same_directory(tmp_path, tokenizer, changes, message):
    run(Made(documents(2)), tmp_path, tokenizer)
    with pytest.raises(TokenizeError, match=f"settings.json: the directory was begun with other settings: {message}"):
        run(Made(documents(2)), tmp_path, tokenizer, **changes)


def test_a_directory_of_something_else_is_left_alone(tmp_path, tokenizer):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TokenizeError, match="is not empty and has no settings.json"):
        run(Made(documents(2)), tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda images: np.zeros((len(images), 3), int), r"gave int64\(2, 3\), expected integers \(2, 4\)"),
        (lambda images: np.zeros((len(images), 4)), "gave float64"),
        (lambda images: np.full((len(images), 4), 256), r"gave codes 256\.\.256, expected 0 <= code < 256"),
    ],
)
def test_wrong_codes_stop_the_job(tmp_path, tokenizer, encode, message):
    with pytest.raises(TokenizeError, match=message):
        run(Made(documents(2)), tmp_path, tokenizer, encode_images=encode)


def test_a_program_error_in_a_source_is_not_a_reject(tmp_path, tokenizer):
    with pytest.raises(KeyError, match="bug"):
        run(Made([*documents(2), KeyError("bug")]), tmp_path, tokenizer, max_reject_share=1.0)


def test_bad_arguments(tmp_path, tokenizer):
    with pytest.raises(TokenizeError, match="source made has no document"):
        run(Made([]), tmp_path, tokenizer)
    with pytest.raises(TokenizeError, match="workers=0"):
        run(Made(documents(1)), tmp_path, tokenizer, workers=0)
    with pytest.raises(ValueError, match="max_reject_share 1.5"):
        run(Made(documents(1)), tmp_path, tokenizer, max_reject_share=1.5)
    small = Vocabulary(text_size=64, image_size=256, sentinels=8, size=400)
    with pytest.raises(TokenizeError, match="the vocabulary 64 for text"):
        run(Made(documents(1)), tmp_path, tokenizer, vocabulary=small)


def test_real_photographs(tmp_path, tokenizer, shared_data):
    source = open_source(str(shared_data / "coco"), "valid")
    manifest = run(source, tmp_path, tokenizer)
    records = Records(tmp_path)
    assert manifest.records == len(source) == 5
    text = decode_document(records[0].ids, tokenizer, VOCABULARY, TOKENS).segments[0]
    assert text == source[0].segments[0]

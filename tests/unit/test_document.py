"""Documents as ids and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3jax.tokens.document import IMAGE, TEXT, Document, DocumentError, Image, Text, decode_document, encode_document
from cm3jax.tokens.text import TextTokenizer, train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=320, image_size=32, sentinels=8, size=400)
IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return train_text_tokenizer(["a cat on a mat"] * 5, 300, tmp_path_factory.mktemp("text") / "text.model")


def image(*codes: int) -> Image:
    return Image(codes=np.array(codes, np.int32))


def plain(document: Document) -> list:
    return [s.text if isinstance(s, Text) else s.codes.tolist() for s in document.segments]


def test_caption_and_image(tokenizer):
    found = encode_document(Document((Text("a cat"), image(0, 31, 5, 5))), tokenizer, VOCABULARY)
    text = tokenizer.encode("a cat")
    assert found.ids.tolist() == [*text, VOCABULARY.break_id, 320, 351, 325, 325]
    assert found.ids.dtype == np.int32
    assert found.segments.tolist() == [[0, len(text), TEXT], [len(text) + 1, 4, IMAGE]]


SEGMENTS = st.lists(
    st.text(max_size=8) | st.lists(st.integers(0, 31), min_size=IMAGE_TOKENS, max_size=IMAGE_TOKENS),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(SEGMENTS)
def test_decode_is_the_inverse_of_encode(tokenizer, segments):
    document = Document(tuple(Text(s) if isinstance(s, str) else image(*s) for s in segments))
    found = encode_document(document, tokenizer, VOCABULARY)
    assert plain(decode_document(found.ids, tokenizer, VOCABULARY, IMAGE_TOKENS)) == segments
    assert not (found.ids == VOCABULARY.eos).any()
    covered = np.zeros(len(found.ids), int)
    for start, length, kind in found.segments:
        covered[start : start + length] += 1
        assert (VOCABULARY.is_image(found.ids[start : start + length]) == (kind == IMAGE)).all()
    np.testing.assert_array_equal(covered, found.ids != VOCABULARY.break_id)


def test_typed_marks_stay_text(tokenizer):
    document = Document((Text("<break></s><sentinel:0>"), image(1, 2, 3, 4)))
    found = encode_document(document, tokenizer, VOCABULARY)
    assert (found.ids == VOCABULARY.break_id).sum() == 1
    assert plain(decode_document(found.ids, tokenizer, VOCABULARY, 4))[0] == "<break></s><sentinel:0>"


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "has no segment"),
        ((Image(pixels=np.zeros((2, 2, 3), np.uint8)),), "segment 0: the image has pixels but no codes"),
        ((Text("a"), image(3, 32)), r"segment 1: image codes 3\.\.32, expected 0 <= code < 32"),
        ((image(-1, 0),), r"image codes -1\.\.0"),
        ((Image(codes=np.zeros((2, 2), np.int32)),), "expected integers"),
        ((Image(codes=np.zeros(4, np.float32)),), "expected integers"),
        ((Text("\ud800"),), "segment 0: text holds a lone surrogate"),
    ],
)
def test_documents_without_ids(tokenizer, segments, message):
    with pytest.raises(DocumentError, match=message):
        encode_document(Document(segments, id="d7"), tokenizer, VOCABULARY)


def test_tokenizer_must_fit_the_vocabulary(tokenizer):
    small = Vocabulary(text_size=64, image_size=32, sentinels=8, size=128)
    with pytest.raises(ValueError, match="the vocabulary 64 for text"):
        encode_document(Document((Text("a"),)), tokenizer, small)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([10, 352, 320, 321, 322], "image at position 2 has 3 tokens, expected 4"),
        ([320, 321, 322, 323, 324], "image at position 0 has 5 tokens, expected 4"),
        ([10, 320, 321, 322, 323], "meet at position 1 without <break>"),
        ([320, 321, 322, 323, 10], "meet at position 4 without <break>"),
        ([10, 2, 11], "</s> at position 1 is not part of a document"),
        ([10, 352, 354], "<sentinel:0> at position 2"),
        ([353], "<eoss> at position 0"),
        ([319], "text:319 at position 0"),
        ([399], "reserved:399 at position 0"),
        ([-1], "at position 0"),
    ],
)
def test_ids_that_are_no_document(tokenizer, ids, message):
    assert tokenizer.size <= 319
    with pytest.raises(DocumentError, match=message):
        decode_document(np.array(ids), tokenizer, VOCABULARY, IMAGE_TOKENS)

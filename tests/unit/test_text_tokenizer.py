"""Text to ids and back, exactly, whatever is typed."""

import pickle

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cm3jax.tokens.text import CONTROL_PIECES, TextTokenizer, train_text_tokenizer

LINES = [
    "a red cactus with a straw hat",
    "two blue boats on a lake at noon",
    "<break> typed by a user",
    "x\u2581y\0z",
    "in 2024 and 2024",
] * 5

HOSTILE = [
    "", " ", "  a  b  ", "\t\n\r\n", "<break>", "</s>", "<s>", "<pad>", "<unk>", "<sentinel:0>", "<0x41>", "\u2581",
    "a\u2581b \u2581 \u2581\u2581", "\0", "a\0b", "\ufeff", "\ufffd", "e\u0301 \u00e9", "\ufb01 \uff21 \u2460",
    "中文，日本語 한국어", "שלום \u200f", "\U0001f469\u200d\U0001f4bb", "\U0010ffff", "\x85\u2028", "12345 3.14",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return train_text_tokenizer(LINES, 320, tmp_path_factory.mktemp("text") / "text.model")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(CONTROL_PIECES) <= i < tokenizer.size for i in ids)


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("\u2581\0</s>")
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(CONTROL_PIECES) <= i < tokenizer.size for i in ids)


def test_learned_pieces_are_used(tokenizer):
    text = "a red cactus with a straw hat"
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_digits_stay_apart(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_lone_surrogate_is_refused_by_place(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


def test_decode_refuses_what_is_no_text(tokenizer):
    with pytest.raises(ValueError, match="id 2 at position 1 is no text piece"):
        tokenizer.decode([10, 2])
    with pytest.raises(ValueError, match=f"id {tokenizer.size} at position 0"):
        tokenizer.decode([tokenizer.size])


def test_broken_utf8_from_a_model_becomes_replacement(tokenizer):
    ids = tokenizer.encode("\U0001f642")
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_training_is_deterministic_and_the_file_loads(tokenizer, tmp_path):
    path = tmp_path / "again.model"
    again = train_text_tokenizer(iter(LINES), 320, path)
    assert again.fingerprint == tokenizer.fingerprint == TextTokenizer.load(path).fingerprint
    assert [entry.name for entry in tmp_path.iterdir()] == ["again.model"]
    other = train_text_tokenizer(["quite other words"], 300, tmp_path / "other.model")
    assert other.fingerprint != tokenizer.fingerprint


def test_pickle_keeps_the_ids(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a lake") == tokenizer.encode("a lake")


def test_too_large_vocab_size_gives_what_the_text_has(tmp_path, caplog):
    tokenizer = train_text_tokenizer(["ab ab ab"], 5000, tmp_path / "small.model")
    assert tokenizer.size < 300
    assert f"gave {tokenizer.size} pieces of the 5000 asked for" in caplog.text


def test_bad_training_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 200, expected at least 261"):
        train_text_tokenizer(LINES, 200, tmp_path / "t.model")
    with pytest.raises(ValueError, match="training for vocab_size 320 failed"):
        train_text_tokenizer([], 320, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_bad_model_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*missing.model"):
        TextTokenizer.load(tmp_path / "missing.model")
    (tmp_path / "noise.model").write_bytes(b"noise")
    with pytest.raises(ValueError, match="noise.model: text tokenizer: not a sentencepiece model"):
        TextTokenizer.load(tmp_path / "noise.model")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"byte_fallback": False}, "0 byte pieces"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"normalization_rule_name": "nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"bos_id": 2, "eos_id": 0}, "ids 0-3 are"),
    ],
)
def test_models_that_break_the_promise_are_refused(tmp_path, changed, message):
    ours = {
        "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True, "add_dummy_prefix": False,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(tmp_path / "m"), model_type="bpe", vocab_size=290,
        hard_vocab_limit=False, minloglevel=2, **(ours | changed),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        TextTokenizer.load(tmp_path / "m.model")

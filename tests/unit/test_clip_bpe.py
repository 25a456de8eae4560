"""CLIP's tokenizer: the released ids, and captions as rows."""

import gzip
import json
import pickle

import numpy as np
import pytest

from cm3jax.tokens.captions import load_caption_tokenizer
from cm3jax.tokens.clean_text import clean
from cm3jax.tokens.clip_bpe import MERGES, ClipTokenizer, split_words
from cm3jax.tokens.text import train_text_tokenizer


@pytest.fixture(scope="module")
def merges(shared_data):
    return shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"


def test_ids_are_those_of_the_released_tokenizer(shared_data, merges):
    tokenizer = ClipTokenizer.load(merges)
    with gzip.open(shared_data / "clip_bpe" / "clip_reference_tokens.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 2642
    wrong = [row["text"] for row in rows if tokenizer.encode(row["text"]) != row["ids"]]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Two\u3000\tSPACES\x85here ", "two spaces\u2026here"),
        ("\u2018a\u2019 \u201cb\u201d", "'a' \"b\""),
        ("\ufb01ne \uff21\uff11 e\u0301", "fine a1 \xe9"),
        ("a &amp;amp; b <p>&lt;", "a & b <p><"),
        ("\033[31mred\033[0m\ufeff\x00", "red"),
        ("one\r\ntwo\u2028three", "one two three"),
    ],
)
def test_text_is_repaired_as_ftfy_does(text, cleaned):
    assert clean(text) == cleaned


def test_words_digits_marks_and_endings_are_apart():
    assert split_words("it's 3.50 <|endoftext|>!? caf\xe9 \u2167x\u0301") == [
        *("it", "'s", "3", ".", "5", "0", "<|endoftext|>", "!?", "caf\xe9", "\u2167", "x", "\u0301")
    ]


def test_rows_begin_end_and_are_cut(merges):
    captions = load_caption_tokenizer(merges, 6)
    rows = captions(["Hello World!", "", "one two three four five six", "a <|endoftext|> b"])
    assert rows[0].tolist() == [49406, 3306, 1002, 256, 49407, 0]
    assert rows[1].tolist() == [49406, 49407, 0, 0, 0, 0]
    assert rows[2, 0] == 49406 and rows[2, -1] == 49407 and 49407 not in rows[2, :-1]
    assert rows[3].tolist() == [49406, 320, 321, 49407, 0, 0]
    again = pickle.loads(pickle.dumps(captions))
    assert np.array_equal(again(["Hello World!"]), rows[:1]) and again.fingerprint == captions.fingerprint


def test_the_projects_own_tokenizer_makes_rows_too(tmp_path):
    own = train_text_tokenizer(["a red dog", "a blue cat"], 300, tmp_path / "text.model")
    captions = load_caption_tokenizer(tmp_path / "text.model", 12)
    (row,) = captions(["a red cat"])
    ids = own.encode("a red cat")
    assert row.tolist() == [0, *ids, 2, *[1] * (10 - len(ids))] and captions.size == own.size


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="CLIP merges: no file"):
        ClipTokenizer.load(tmp_path / "none.txt.gz")
    (tmp_path / "short.txt").write_text("# version\na b\n")
    with pytest.raises(ValueError, match=f"short.txt: CLIP merges: found line 3 with 0 parts, expected {MERGES} pairs"):
        ClipTokenizer.load(tmp_path / "short.txt")
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="broken.txt.gz: Not a gzipped file"):
        ClipTokenizer.load(tmp_path / "broken.txt.gz")
    with pytest.raises(ValueError, match=r"expected CLIP merges \(.txt, .txt.gz\) or a sentencepiece .model"):
        load_caption_tokenizer("vocab.json", 8)

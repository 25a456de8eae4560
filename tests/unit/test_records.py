"""Records on disk: what is written is read, by us, by TFDS and by Grain, and damage is named."""

import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from cm3jax.data.record_writer import write_manifest, write_shard
from cm3jax.data.records import Manifest, Record, Records, RecordsError, content_fingerprint, read_index
from cm3jax.tokens.vocabulary import Vocabulary

PER_SHARD = (3, 0, 2)


def make_record(index: int, vocabulary: Vocabulary) -> Record:
    rng = np.random.default_rng(index)
    ids = rng.integers(0, vocabulary.size, 5 + index).astype(vocabulary.dtype)
    return Record(ids, np.array([[0, 2, 0], [3, 2 + index, 1]], np.int32), f"doc/{index}é", 10 * index)


def make(folder: pathlib.Path, vocabulary: Vocabulary, split: str = "train") -> list[Record]:
    records = [make_record(i, vocabulary) for i in range(sum(PER_SHARD))]
    indexes = []
    for shard, count in enumerate(PER_SHARD):
        begin = sum(PER_SHARD[:shard])
        part = records[begin : begin + count]
        indexes.append(write_shard(folder, split, shard, len(PER_SHARD), part, vocabulary, [f"reject {shard}\n"]))
    manifest = Manifest(
        split=split, shards=len(PER_SHARD), records=len(records), rejects=3, tokens=sum(len(r.ids) for r in records),
        vocabulary=vocabulary, image_tokens=4, image_size=16, text_tokenizer="t", image_tokenizer="i",
        source_name="toy", source="s", content=content_fingerprint(indexes),
    )  # fmt: skip
    write_manifest(folder, manifest, indexes)
    return records


def same(a: Record, b: Record) -> bool:
    return (a.id, a.index, a.ids.tolist(), a.segments.tolist()) == (b.id, b.index, b.ids.tolist(), b.segments.tolist())


@pytest.mark.parametrize("size", [128, 1 << 16, 1 << 18])
def test_records_come_back(tmp_path, size):
    vocabulary = Vocabulary(text_size=64, image_size=32, sentinels=8, size=size)
    written = make(tmp_path, vocabulary)
    records = Records(tmp_path)
    assert len(records) == 5 and all(same(records[i], written[i]) for i in range(5))
    assert records[0].ids.dtype == vocabulary.dtype and records[0].segments.shape == (2, 3)
    assert records.lengths.dtype == np.int32 and records.lengths.tolist() == [5, 6, 7, 8, 9]
    assert records.vocabulary == vocabulary and records.image_tokens == 4
    with pytest.raises(IndexError, match="record 5 of 5"):
        records[5]


def test_tfds_and_grain_read_them(tmp_path, tiny_vocabulary):
    written = make(tmp_path, tiny_vocabulary, split="valid")
    source = tfds.builder_from_directory(str(tmp_path)).as_data_source("valid")
    assert len(source) == 5
    for record, example in zip(written, source, strict=True):
        assert same(record, Record(example["ids"], example["segments"], example["id"].decode(), example["index"]))
    dataset = grain.MapDataset.source(source).seed(1).shuffle()
    assert sorted(dataset[i]["index"] for i in range(5)) == [0, 10, 20, 30, 40]


def test_reading_and_writing_need_no_tensorflow():
    code = "import sys, cm3jax.data.tokenize, cm3jax.data.sources.tfds; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_same_records_give_the_same_bytes(tmp_path, tiny_vocabulary):
    for folder in ("a", "b"):
        make(tmp_path / folder, tiny_vocabulary)
    files = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("a", "b")]
    assert files[0] == files[1]
    assert not any(name.startswith(".") for name in files[0])


def test_fingerprint_changes_with_the_content_only(tmp_path, tiny_vocabulary):
    make(tmp_path / "a", tiny_vocabulary)
    make(tmp_path / "b", tiny_vocabulary)
    make(tmp_path / "c", dataclasses.replace(tiny_vocabulary, sentinels=7))
    a, b, c = (Records(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_pickled_records_read_on(tmp_path, tiny_vocabulary):
    written = make(tmp_path, tiny_vocabulary)
    records = Records(tmp_path)
    assert same(records[4], written[4])
    assert same(pickle.loads(pickle.dumps(records))[4], written[4])


def test_sidecar_keeps_what_the_shard_refused(tmp_path, tiny_vocabulary):
    make(tmp_path, tiny_vocabulary)
    assert read_index(tmp_path, "train", 1, 3).rejects == "reject 1\n"


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, tiny_vocabulary):
    bad = Record(np.array([3, 128], np.int32), np.zeros((0, 3), np.int32), "d9", 0)
    with pytest.raises(RecordsError, match=r"record 'd9': ids 3\.\.128, expected 0 <= id < 128"):
        write_shard(tmp_path, "train", 0, 1, [bad], tiny_vocabulary)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


DATA, INDEX = "records-train.array_record-00000-of-00003", "index-00000-of-00003.npz"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", None, "no .*manifest.json: not a records directory, or its job has not finished"),
        ("manifest.json", b"{", "damaged manifest .*manifest.json"),
        ("manifest.json", b"[]", "manifest.json: not a manifest of format 1"),
        ("manifest.json", b'{"format": 1, "split": 3}', "damaged manifest .*manifest.json: .*split"),
        (INDEX, None, f"missing shard index .*{INDEX}"),
        (INDEX, b"PK", f"damaged shard index .*{INDEX}"),
        (DATA, None, f"missing shard .*{DATA}"),
        (DATA, b"short", f"damaged shard .*{DATA}: 5 bytes, expected"),
    ],
)
def test_missing_or_damaged_files_are_named(tmp_path, tiny_vocabulary, name, damage, message):
    make(tmp_path, tiny_vocabulary)
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(damage)
    with pytest.raises(RecordsError, match=message):
        Records(tmp_path)


def test_a_flipped_byte_is_named_when_read(tmp_path, tiny_vocabulary):
    make(tmp_path, tiny_vocabulary)
    content = bytearray((tmp_path / DATA).read_bytes())
    place = bytes(content).index("doc/0é".encode())
    content[place] ^= 1
    (tmp_path / DATA).write_bytes(content)
    records = Records(tmp_path)
    with pytest.raises(RecordsError, match=f"damaged shard .*{DATA}, record 0"):
        records[0]
    assert records[3].index == 30


def test_indexes_of_another_job_are_refused(tmp_path, tiny_vocabulary):
    make(tmp_path, tiny_vocabulary)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"content": "0" * 16}))
    with pytest.raises(RecordsError, match="not those that manifest.json was written for"):
        Records(tmp_path)

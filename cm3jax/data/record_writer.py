"""Writing records: shard by shard, each whole or not at all, the same records as the same bytes."""

import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from cm3jax import config
from cm3jax.data.records import (
    MANIFEST,
    NAME,
    Manifest,
    Record,
    RecordsError,
    ShardIndex,
    features,
    id_digest,
    index_path,
    shard_path,
)
from cm3jax.files import publish, temporary, write_atomic
from cm3jax.tokens.vocabulary import Vocabulary


def write_shard(
    directory: pathlib.Path,
    split: str,
    shard: int,
    shards: int,
    records: Iterable[Record],
    vocabulary: Vocabulary,
    rejects: Sequence[str] = (),
) -> ShardIndex:
    """Writes one shard, then its index, each whole or not at all. Same records, same bytes.

    `rejects`: lines of `rejects.jsonl`, read after the last record, so that whoever makes the records may add to them.

    Raises:
      RecordsError: an id that is not in the vocabulary.
    """
    path = shard_path(directory, split, shard, shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = features(vocabulary)
    serializer = ExampleSerializer(spec.get_serialized_info())
    writer = ArrayRecordWriter(str(temporary(path)), "group_size:1")
    lengths, indices, digests, example_bytes = [], [], [], 0
    try:
        for record in records:
            example = serializer.get_tf_example(spec.encode_example(_example(record, vocabulary)))
            content = example.SerializeToString(deterministic=True)  # a proto map has no order of its own
            writer.write(content)
            lengths.append(len(record.ids))
            indices.append(record.index)
            digests.append(id_digest(record.id))
            example_bytes += len(content)
    finally:
        writer.close()
    with open(temporary(path), "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    publish(path)
    index = ShardIndex(
        lengths=np.array(lengths, np.int32),
        indices=np.array(indices, np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
        rejects="".join(rejects),
        example_bytes=example_bytes,
        file_bytes=path.stat().st_size,
        sha256=sha256,
    )
    _write_index(index_path(directory, shard, shards), index)
    return index


def _example(record: Record, vocabulary: Vocabulary) -> dict[str, Any]:
    ids = np.asarray(record.ids)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary.size:
        raise RecordsError(f"record {record.id!r}: ids {ids.min()}..{ids.max()}, expected 0 <= id < {vocabulary.size}")
    return {
        "ids": ids.astype(vocabulary.dtype),
        "segments": np.asarray(record.segments, np.int32).reshape(-1, 3),
        "id": record.id,
        "index": record.index,
    }


def _write_index(path: pathlib.Path, index: ShardIndex) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        lengths=index.lengths,
        indices=index.indices,
        digests=index.digests,
        rejects=np.frombuffer(index.rejects.encode(), np.uint8),
        sizes=np.array([index.example_bytes, index.file_bytes], np.int64),
        sha256=np.frombuffer(bytes.fromhex(index.sha256), np.uint8),
    )
    write_atomic(path, buffer.getvalue())


def write_manifest(directory: pathlib.Path, manifest: Manifest, shards: list[ShardIndex]) -> None:
    """Finishes a directory: the TFDS metadata, then the manifest."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split=manifest.split, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=manifest.split,
        shard_lengths=[len(index.lengths) for index in shards],
        num_bytes=sum(index.example_bytes for index in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(manifest.vocabulary),
        split_infos=[split],
        version="1.0.0",
        description="Tokenised documents.",
        check_data=False,  # the check would need TensorFlow
    )
    write_atomic(directory / MANIFEST, (json.dumps(config.to_dict(manifest), indent=2) + "\n").encode())

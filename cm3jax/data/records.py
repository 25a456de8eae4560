"""Records on disk: tokenised documents in ArrayRecord shards that TFDS and Grain read, too.

A directory holds one split of one source:

    records-train.array_record-00000-of-00002    tf.train.Example protos, one a document
    index-00000-of-00002.npz                     per shard: lengths, source indices, id digests, rejects, checksum
    dataset_info.json, features.json             so that `tfds.builder_from_directory` opens the directory
    manifest.json                                written last: what the ids mean; without it the job is not finished

A shard's index is written after the shard: where it stands, the shard is whole. `record_writer.py` writes all this.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32, Int64, UInt, UInt8
from tensorflow_datasets.proto import tf_example_pb2

from cm3jax import config
from cm3jax.tokens.vocabulary import Vocabulary

NAME = "records"
MANIFEST = "manifest.json"
FORMAT = 1


class RecordsError(ValueError):
    """Records that cannot be read or written; the message names the file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One tokenised document.

    Attributes:
      ids: tokens, in the vocabulary's dtype.
      segments: rows (start, length, kind) of `ids`; kinds as in `cm3jax.tokens.document`.
      id: the document's id in its source.
      index: its index in its source.
    """

    ids: UInt[np.ndarray, " N"]
    segments: Int32[np.ndarray, "S 3"]
    id: str
    index: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished directory says of itself.

    Attributes:
      image_tokens: tokens of every image.
      image_size: side of the square pictures that were encoded, pixels.
      text_tokenizer, image_tokenizer, source: fingerprints.
      content: fingerprint of all shards.
    """

    split: str
    shards: int
    records: int
    rejects: int
    tokens: int
    vocabulary: Vocabulary
    image_tokens: int
    image_size: int
    text_tokenizer: str
    image_tokenizer: str
    source_name: str
    source: str
    content: str
    format: int = FORMAT


@dataclasses.dataclass(frozen=True, eq=False)
class ShardIndex:
    """The sidecar of one shard: all that is needed without opening the shard.

    Attributes:
      lengths: tokens of each record.
      indices: source index of each record.
      digests: 128-bit digest of each document's id.
      rejects: the shard's lines of `rejects.jsonl`.
      example_bytes: sum of the serialised records' sizes.
      file_bytes: size of the shard's file.
      sha256: of the shard's file.
    """

    lengths: Int32[np.ndarray, " N"]
    indices: Int64[np.ndarray, " N"]
    digests: UInt8[np.ndarray, "N 16"]
    rejects: str
    example_bytes: int
    file_bytes: int
    sha256: str


def id_digest(document_id: str) -> bytes:
    """16 bytes that stand for a document's id."""
    return hashlib.blake2b(document_id.encode(), digest_size=16).digest()


def shard_path(directory: pathlib.Path, split: str, shard: int, shards: int) -> pathlib.Path:
    return directory / f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def index_path(directory: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
    return directory / f"index-{shard:05d}-of-{shards:05d}.npz"


def features(vocabulary: Vocabulary) -> tfds.features.FeaturesDict:
    """The TFDS features of a record; ids and segments are stored as raw bytes, not as varints."""
    return tfds.features.FeaturesDict(
        {
            "ids": tfds.features.Tensor(shape=(None,), dtype=vocabulary.dtype, encoding="bytes"),
            "segments": tfds.features.Tensor(shape=(None, 3), dtype=np.int32, encoding="bytes"),
            "id": tfds.features.Text(),
            "index": np.int64,
        }
    )


def read_index(directory: pathlib.Path, split: str, shard: int, shards: int) -> ShardIndex:
    """The sidecar of a finished shard, after a check that the shard stands beside it with the size it should have.

    Raises:
      RecordsError: the sidecar or the shard is missing or damaged.
    """
    path = index_path(directory, shard, shards)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            example_bytes, file_bytes = (int(size) for size in arrays["sizes"])
            index = ShardIndex(
                lengths=arrays["lengths"],
                indices=arrays["indices"],
                digests=arrays["digests"],
                rejects=arrays["rejects"].tobytes().decode(),
                example_bytes=example_bytes,
                file_bytes=file_bytes,
                sha256=arrays["sha256"].tobytes().hex(),
            )
    except FileNotFoundError:
        raise RecordsError(f"missing shard index {path}") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RecordsError(f"damaged shard index {path}: {error}") from error
    data = shard_path(directory, split, shard, shards)
    size = data.stat().st_size if data.is_file() else None
    if size is None:
        raise RecordsError(f"missing shard {data}")
    if size != file_bytes:
        raise RecordsError(f"damaged shard {data}: {size} bytes, expected {file_bytes}")
    return index


def read_manifest(directory: pathlib.Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
      RecordsError: no or a damaged manifest, or one of another format.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise RecordsError(f"{path}: not a manifest of format {FORMAT}")
        return config.build(Manifest, values)
    except FileNotFoundError:
        raise RecordsError(f"no {path}: not a records directory, or its job has not finished") from None
    except (UnicodeDecodeError, json.JSONDecodeError, config.ConfigError) as error:
        raise RecordsError(f"damaged manifest {path}: {error}") from error


def content_fingerprint(shards: list[ShardIndex]) -> str:
    """Sixteen hex digits of all shards' checksums and lengths, in order."""
    return config.fingerprint([[index.sha256, len(index.lengths), int(index.lengths.sum())] for index in shards])


class Records:
    """Random access to the records of a directory; threads may share it, processes may pickle it.

    Attributes:
      manifest: what the directory says of itself.
      vocabulary, image_tokens: from the manifest.
      lengths: tokens of each record, known without reading a record.
      fingerprint: changes when any record or the meaning of the ids changes.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a finished directory.

        Raises:
          RecordsError: manifest, index or shard is missing or damaged, or they disagree.
        """
        self.directory = pathlib.Path(directory)
        self.manifest = read_manifest(self.directory)
        self.vocabulary = self.manifest.vocabulary
        self.image_tokens = self.manifest.image_tokens
        self.fingerprint = config.fingerprint(self.manifest)
        split, shards = self.manifest.split, self.manifest.shards
        indexes = [read_index(self.directory, split, shard, shards) for shard in range(shards)]
        self.lengths: Int32[np.ndarray, " N"] = np.concatenate([i.lengths for i in indexes] or [np.empty(0, np.int32)])
        self._starts = np.cumsum([0, *(len(index.lengths) for index in indexes)])
        self._paths = [shard_path(self.directory, split, shard, shards) for shard in range(shards)]
        self._readers: dict[int, ArrayRecordReader] = {}
        if len(self) != self.manifest.records or content_fingerprint(indexes) != self.manifest.content:
            raise RecordsError(f"{self.directory}: the shard indexes are not those that {MANIFEST} was written for")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Record:
        """Record `i`, 0 <= i < len.

        Raises:
          IndexError: no such record.
          RecordsError: the shard is damaged there.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.directory}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        reader = self._readers.get(shard)
        try:
            if reader is None:
                reader = ArrayRecordReader(
                    str(self._paths[shard]), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
                )
                self._readers[shard] = reader
            content = reader.read([int(i - self._starts[shard])])[0]
        except RuntimeError as error:
            raise RecordsError(f"damaged shard {self._paths[shard]}, record {i}: {error}") from error
        return self._parse(content)

    def _parse(self, content: bytes) -> Record:
        # TFDS reads the same bytes; this is five times faster.
        feature = tf_example_pb2.Example.FromString(content).features.feature
        segments = np.frombuffer(feature["segments"].bytes_list.value[0], np.int32).reshape(-1, 3)
        return Record(
            ids=np.frombuffer(feature["ids"].bytes_list.value[0], self.vocabulary.dtype),
            segments=segments,
            id=feature["id"].bytes_list.value[0].decode(),
            index=feature["index"].int64_list.value[0],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

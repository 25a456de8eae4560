"""A cleaned set on disk: tar files that `webdataset:` opens, and what makes the job start again where it was.

    shard-00000-of-00002.tar     000000012.json {"id": .., "segments": [{"text": ..}, {"image": "0.jpg"}]}
                                 000000012.0.jpg
    index-00000-of-00002.json    written after its shard: counts, checksum, refused documents, signatures
    settings.json  rejects.jsonl
    manifest.json                written last: without it the job is not finished

Members are named by the document's index in the source, so that no key can lead anywhere.
"""

import collections
import dataclasses
import hashlib
import io
import json
import logging
import pathlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

from cm3jax import config
from cm3jax.data.ingest.duplicates import Match
from cm3jax.data.ingest.prepare import Prepared, Signature, signature_of_bytes
from cm3jax.data.ingest.settings import IngestConfig, IngestError, Settings
from cm3jax.data.jobs import REJECTS
from cm3jax.data.rejects import Reject
from cm3jax.files import publish, temporary, write_atomic

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Judged = tuple[Prepared, Match | None]


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The sidecar of one shard.

    Attributes:
      bytes, sha256: of the tar file.
      rejects: lines of `rejects.jsonl`.
      signatures: of all documents that obeyed the rules, duplicates included; later documents are compared with them.
    """

    documents: int
    pictures: int
    bytes: int
    sha256: str
    rejects: list[str]
    signatures: list[Signature]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished directory says of itself.

    Attributes:
      settings: fingerprint of `settings.json`.
      source: documents of the source; as many as `documents` and all `rejects`.
      rejects: counts by reason.
      content: fingerprint of all shards.
      files: name and size of each shard.
    """

    settings: str
    source: int
    documents: int
    pictures: int
    rejects: dict[str, int]
    content: str
    files: dict[str, int]


def shard_path(out: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
    return out / f"shard-{shard:05d}-of-{shards:05d}.tar"


def index_path(out: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
    return out / f"index-{shard:05d}-of-{shards:05d}.json"


def write_shard(out: pathlib.Path, settings: Settings, shard: int, items: Iterable[Judged | Reject]) -> None:
    """Writes one shard, then its sidecar, each whole or not at all. Same items, same bytes.

    `items`: the shard's documents in the source's order.
    """
    path = shard_path(out, shard, settings.shards)
    rejects: list[str] = []
    signatures: list[Signature] = []
    documents = pictures = 0
    with tarfile.open(temporary(path), "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in items:
            if isinstance(item, Reject):
                rejects.append(item.line())
                continue
            document, match = item
            signatures.append(document.signature)
            if match is not None:
                rejects.append(match.reject(document).line())
                continue
            for name, content in _members(document, settings.config):
                info = tarfile.TarInfo(name)  # time, user and mode are constants
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            documents += 1
            pictures += sum(isinstance(segment, bytes) for segment in document.segments)
    with open(temporary(path), "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    publish(path)
    index = ShardIndex(documents, pictures, path.stat().st_size, sha256, rejects, signatures)
    write_atomic(index_path(out, shard, settings.shards), json.dumps(_to_json(index)).encode())


def _members(document: Prepared, config_: IngestConfig) -> Iterator[tuple[str, bytes]]:
    stem = f"{document.index:09d}"
    suffix = {"jpeg": "jpg", "png": "png"}[config_.picture_format]
    files: dict[str, bytes] = {}
    segments = []
    for segment in document.segments:
        if isinstance(segment, str):
            segments.append({"text": segment})
        else:
            name = f"{len(files)}.{suffix}"
            files[name] = segment
            segments.append({"image": name})
    yield f"{stem}.json", json.dumps({"id": document.key, "segments": segments}, ensure_ascii=False).encode()
    yield from ((f"{stem}.{name}", content) for name, content in files.items())


def read_shard_index(out: pathlib.Path, settings: Settings, shard: int) -> ShardIndex | None:
    """The sidecar of a finished shard; None where shard or sidecar is missing, or damaged, which is logged."""
    path = index_path(out, shard, settings.shards)
    tar = shard_path(out, shard, settings.shards)
    if not path.exists():
        return None
    try:
        index = _from_json(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("shard %d is written again: damaged %s: %r", shard, path, error)
        return None
    size = tar.stat().st_size if tar.is_file() else None
    if size != index.bytes:
        logger.warning("shard %d is written again: %s has %s bytes, expected %d", shard, tar, size, index.bytes)
        return None
    return index


def finished(out: pathlib.Path) -> Manifest | None:
    """The manifest, if the job is done and every shard has the size that the manifest says."""
    try:
        manifest = config.build(Manifest, json.loads((out / MANIFEST).read_bytes()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is written again: %s", out / MANIFEST, error)
        return None
    sizes = {name: (out / name).stat().st_size if (out / name).is_file() else None for name in manifest.files}
    return manifest if sizes == manifest.files else None


def finish(out: pathlib.Path, settings: Settings) -> Manifest:
    """Writes the log of refused documents and the manifest.

    Raises:
      IngestError: a shard is missing, or every document of the source was refused.
    """
    lines: list[str] = []
    digest = hashlib.sha256()
    files: dict[str, int] = {}
    documents = pictures = 0
    for shard in range(settings.shards):
        index = read_shard_index(out, settings, shard)
        path = shard_path(out, shard, settings.shards)
        if index is None:
            raise IngestError(f"{path} is missing or damaged: run the same command again")
        lines += index.rejects
        files[path.name] = index.bytes
        digest.update(bytes.fromhex(index.sha256))
        documents, pictures = documents + index.documents, pictures + index.pictures
    write_atomic(out / REJECTS, "".join(lines).encode())
    reasons = collections.Counter(json.loads(line)["reason"] for line in lines)
    if not documents:
        raise IngestError(f"all {settings.documents} documents were refused, see {out / REJECTS}: {dict(reasons)}")
    manifest = Manifest(
        settings=config.fingerprint(settings.flat()),
        source=settings.documents,
        documents=documents,
        pictures=pictures,
        rejects=dict(sorted(reasons.items())),
        content=digest.hexdigest()[:16],
        files=files,
    )
    write_atomic(out / MANIFEST, (json.dumps(config.to_dict(manifest), indent=2) + "\n").encode())
    return manifest


def _to_json(index: ShardIndex) -> dict[str, Any]:
    signatures = [
        [s.index, *(part.hex() for part in (s.id, s.document, s.images, s.bits.tobytes(), s.detail.tobytes()))]
        for s in index.signatures
    ]
    return {**dataclasses.asdict(dataclasses.replace(index, signatures=[])), "signatures": signatures}


def _from_json(values: dict[str, Any]) -> ShardIndex:
    signatures = [signature_of_bytes(index, *map(bytes.fromhex, digits)) for index, *digits in values["signatures"]]
    return ShardIndex(**{**values, "signatures": signatures})

"""A plan on disk: one file, opened by memory map.

    magic, size and checksum of the header, header (JSON: fingerprint, counts, checksum), then offsets, spans, pieces

The columns are little-endian, as in `Plan`.
"""

import json
import os
import pathlib
import struct
import tempfile
import zlib
from typing import Any

import numpy as np

from cm3jax.data.framing import PIECE
from cm3jax.data.packing import Plan

MAGIC = b"CM3PLAN1"
START = struct.Struct("<8sII")
ALIGNMENT = 64


class PlanFileError(ValueError):
    """A plan file that is damaged or is another plan's; the message names the file."""


def write_plan(path: pathlib.Path, plan: Plan, fingerprint: str) -> None:
    """Writes the file whole or not at all, also when several processes write it at once.

    Args:
      fingerprint: of everything the plan was made from.
    """
    columns = [np.ascontiguousarray(a) for a in (plan.offsets, plan.spans, plan.pieces)]
    checksum = 0
    for column in columns:
        checksum = zlib.crc32(column.view(np.uint8).data, checksum)
    header = {
        "fingerprint": fingerprint,
        "sequences": len(plan),
        "pieces": len(plan.pieces),
        "skipped": plan.skipped,
        "crc32": checksum,
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(START.size + len(encoded)) % ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(START.pack(MAGIC, len(encoded), zlib.crc32(encoded)) + encoded)
            for column in columns:
                file.write(column.view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_plan(path: pathlib.Path, fingerprint: str) -> Plan:
    """Maps the file into memory after checking all of it.

    Raises:
      FileNotFoundError: no such file.
      PlanFileError: not a plan, a damaged one, or one with another fingerprint.
    """
    content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    header, start = _read_header(path, content)
    if header["fingerprint"] != fingerprint:
        raise PlanFileError(f"{path}: plan {header['fingerprint']}, expected {fingerprint}")
    sequences, pieces = header["sequences"], header["pieces"]
    sizes = [8 * (sequences + 1), 2 * sequences, PIECE.itemsize * pieces]
    bounds = np.cumsum([start, *sizes])
    if len(content) != bounds[-1]:
        raise PlanFileError(f"{path}: {len(content)} bytes, expected {bounds[-1]}")
    checksum = zlib.crc32(content[start:].data)
    if checksum != header["crc32"]:
        raise PlanFileError(f"{path}: checksum {checksum}, expected {header['crc32']}")
    offsets, spans, rows = (content[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    return Plan(rows.view(PIECE), offsets.view(np.int64), spans.view(np.uint16), header["skipped"])


def _read_header(path: pathlib.Path, content: np.ndarray) -> tuple[dict[str, Any], int]:
    """The header and where the columns start."""
    if len(content) < START.size or bytes(content[: len(MAGIC)]) != MAGIC:
        raise PlanFileError(f"{path}: not a plan file")
    _, size, checksum = START.unpack(bytes(content[: START.size]))
    encoded = bytes(content[START.size : START.size + size])
    if zlib.crc32(encoded) != checksum:
        raise PlanFileError(f"{path}: damaged header")
    return json.loads(encoded), START.size + size

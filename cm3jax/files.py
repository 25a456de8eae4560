"""Files that appear whole or not at all."""

import os
import pathlib


def temporary(path: pathlib.Path) -> pathlib.Path:
    """Where `path` is written before it is published: one fixed hidden name, so a rerun replaces what a kill left."""
    return path.with_name(f".{path.name}.tmp")


def publish(path: pathlib.Path) -> None:
    """Makes the finished `temporary(path)` durable and gives it its name."""
    source = temporary(path)
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Writes `content` so that a reader, or a rerun after a kill, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary(path).write_bytes(content)
    publish(path)

"""Documents with their neighbours, kept for a report: pictures, captions and scores."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cm3jax.data.records import Records
from cm3jax.data.sources.source import Source
from cm3jax.files import write_atomic
from cm3jax.retrieval.neighbours import NeighbourTable
from cm3jax.tokens.document import Document, pictures, texts
from cm3jax.tokens.image import fit

Row = list[tuple[UInt8[np.ndarray, "size size 3"], str]]


def save_neighbours(
    folder: Path,
    table: NeighbourTable,
    queries: tuple[Records, Source],
    memory: tuple[Records, Source],
    count: int,
    size: int,
) -> None:
    """Writes the first `count` records of `queries` and their candidates for `load_neighbours`.

    Args:
      queries, memory: records and the source that they were made from.
      size: of the pictures, pixels a side.
    """
    images: list[UInt8[np.ndarray, "size size 3"]] = []
    rows: list[list[str]] = []

    def keep(records: Records, source: Source, record: int, label: str) -> str:
        document = source[records[record].index]
        images.append(_picture(document, size))
        return f"{label}: {' '.join(texts(document))}"

    by_image = table.manifest.selection.by_image
    for record, row in enumerate(table.rows(np.arange(min(count, len(table))))):
        captions = [keep(*queries, record, "query")]
        for place, (hit, score) in enumerate(zip(row["ids"].tolist(), row["scores"].tolist(), strict=True)):
            if hit >= 0:
                captions.append(keep(*memory, hit, f"by {'image' if place < by_image else 'text'}, {score:.2f}"))
        rows.append(captions)
    np.savez_compressed(folder / "neighbours.npz", pictures=np.stack(images))
    write_atomic(folder / "neighbours.json", json.dumps(rows, indent=2).encode())


def load_neighbours(folder: Path) -> list[Row]:
    """Rows of (picture, caption), the query first; none where nothing was saved."""
    if not (folder / "neighbours.json").exists():
        return []
    with np.load(folder / "neighbours.npz", allow_pickle=False) as arrays:
        images = iter(arrays["pictures"])
    return [
        [(next(images), caption) for caption in row] for row in json.loads((folder / "neighbours.json").read_text())
    ]


def _picture(document: Document, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Of a document without picture, a grey one."""
    seen = pictures(document)
    return fit(seen[0], size) if seen else np.full((size, size, 3), 127, np.uint8)

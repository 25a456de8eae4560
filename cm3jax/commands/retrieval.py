"""`cm3 retrieval`: embeddings of records, neighbour tables, and a look at them."""

import argparse
import os
from pathlib import Path

import jax
import numpy as np

from cm3jax.commands import HelpFormatter
from cm3jax.data.records import Records
from cm3jax.data.sources.open import open_source
from cm3jax.parallel.departure import joined
from cm3jax.parallel.distributed import from_environment
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.retrieval.backends import BackendConfig
from cm3jax.retrieval.embed import embed
from cm3jax.retrieval.embeddings import Embeddings
from cm3jax.retrieval.encoder import load_encoder
from cm3jax.retrieval.find_neighbours import find_neighbours
from cm3jax.retrieval.neighbours import NeighbourTable
from cm3jax.retrieval.places import Places, write_places
from cm3jax.retrieval.search import SearchConfig
from cm3jax.retrieval.select import SelectionConfig

EPILOG = """examples:
  cm3 retrieval embed --records records/train --source coco:captions.json,images --split train \\
      --encoder runs/clip --out embeddings/train
  cm3 retrieval neighbours --embeddings embeddings/train --memory embeddings/train --out neighbours/train
  cm3 retrieval show --neighbours neighbours/train --records records/train --index 0

embed and neighbours go on where they were killed when the same command is given again; several processes share the
shards: see launch/, whose scripts set CM3_PROCESSES, CM3_PROCESS and CM3_COORDINATOR, or CM3_CLUSTER=1
"""

KINDS = ("exact", "faiss-flat", "faiss-ivfpq", "faiss-hnsw")
SELECTION, SEARCH, BACKEND = SelectionConfig(), SearchConfig(), BackendConfig()


def embed_command(options: argparse.Namespace) -> None:
    with joined(from_environment(os.environ)):
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        encoder = load_encoder(
            options.encoder, mesh, size=options.size, tokenizer=options.tokenizer, batch_size=options.batch_size
        )
        embed(
            Records(options.records),
            open_source(options.source, split=options.split),
            encoder,
            options.out,
            query_dropout=options.query_dropout,
            seed=options.seed,
            process=jax.process_index(),
            processes=jax.process_count(),
            workers=options.workers,
        )
        if jax.process_index() == 0:
            places = Places(str(options.records), str(options.encoder), options.size, options.tokenizer)
            write_places(options.out, places)


def neighbours_command(options: argparse.Namespace) -> None:
    selection = SelectionConfig(
        max_score=options.max_score,
        min_score=options.min_score,
        max_similarity=options.max_similarity,
        whole_documents=not options.any_documents,
        by_image=options.by_image,
        by_text=options.by_text,
        searched=options.searched,
        query_dropout=options.query_dropout,
    )
    backend = BackendConfig(kind=options.backend, exact=SearchConfig(memory_bytes=options.memory_mb << 20))
    with joined(from_environment(os.environ)):
        find_neighbours(
            Embeddings(options.embeddings),
            [Embeddings(path) for path in options.memory],
            options.out,
            selection,
            backend,
            make_mesh(MeshConfig(), jax.local_devices()),
            process=jax.process_index(),
            processes=jax.process_count(),
        )


def show_command(options: argparse.Namespace) -> None:
    table, records = NeighbourTable(options.neighbours), Records(options.records)
    row = table.rows(np.array([options.index]))[0]
    print(f"record {options.index} ({records[options.index].id!r}): rows of the memory and their scores")
    for place, (hit, score) in enumerate(zip(row["ids"].tolist(), row["scores"].tolist(), strict=True)):
        part = "image" if place < table.manifest.selection.by_image else "text"
        print(f"  by {part}: {'none' if hit < 0 else f'{hit}, {score:.4f}'}")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("cm3 retrieval", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("embed", help="embed the documents of records", formatter_class=HelpFormatter)
    command.add_argument("--records", type=Path, required=True, help="folder of records")
    command.add_argument("--source", required=True, help="what the records were made from: see `cm3 data tokenize`")
    command.add_argument("--split", choices=("train", "valid"), help="as it was given to `cm3 data tokenize`")
    command.add_argument("--encoder", type=Path, required=True, help="a clip run, or a file of CLIP's weights")
    command.add_argument("--size", help="of a file: vit-b-32 or vit-l-14")
    command.add_argument("--tokenizer", help="of a file: CLIP's merges; a run knows its own")
    command.add_argument("--out", type=Path, required=True, help="folder of embeddings; the same command resumes")
    command.add_argument("--batch-size", type=int, default=256, help="documents encoded at once")
    command.add_argument("--query-dropout", type=float, default=SELECTION.query_dropout, help="share of query tokens")
    command.add_argument("--seed", type=int, default=0, help="of the query dropout")
    command.add_argument("--workers", type=int, default=4, help="threads that read and decode")
    command.set_defaults(function=embed_command)

    command = commands.add_parser("neighbours", help="find every record's neighbours", formatter_class=HelpFormatter)
    command.add_argument("--embeddings", type=Path, required=True, help="of the records that look for neighbours")
    command.add_argument("--memory", type=Path, nargs="+", required=True, help="embeddings that are looked through")
    command.add_argument("--out", type=Path, required=True, help="folder of the table; the same command resumes")
    command.add_argument("--backend", default=BACKEND.kind, choices=KINDS, help="what searches")
    command.add_argument("--memory-mb", type=int, default=SEARCH.memory_bytes >> 20, help="of a device, for the bank")
    command.add_argument("--max-score", type=float, default=SELECTION.max_score, help="more is too much like the query")
    command.add_argument("--min-score", type=float, default=SELECTION.min_score, help="less is not relevant")
    command.add_argument("--max-similarity", type=float, default=SELECTION.max_similarity, help="within one sample")
    command.add_argument("--any-documents", action="store_true", help="also documents without text or without image")
    command.add_argument("--by-image", type=int, default=SELECTION.by_image, help="hits kept by the query's image")
    command.add_argument("--by-text", type=int, default=SELECTION.by_text, help="hits kept by the query's text")
    command.add_argument("--searched", type=int, default=SELECTION.searched, help="hits looked at, of each kind")
    command.add_argument("--query-dropout", type=float, default=SELECTION.query_dropout, help="as given to embed")
    command.set_defaults(function=neighbours_command)

    command = commands.add_parser("show", help="print one record's neighbours", formatter_class=HelpFormatter)
    command.add_argument("--neighbours", type=Path, required=True)
    command.add_argument("--records", type=Path, required=True)
    command.add_argument("--index", type=int, default=0)
    command.set_defaults(function=show_command)
    return root


def main(argv: list[str]) -> int:
    """`cm3 retrieval`; `argv` without the command's own name."""
    options = parser().parse_args(argv)
    options.function(options)
    return 0

"""Exact inner-product search of this package against FAISS `IndexFlatIP`: queries a second, in one process.

Both search the same bank with the same queries on the same cores, in turns of ours, theirs, theirs, ours; each turn
gives one ratio of times, and what is reported is their median with the smallest and the largest.

    JAX_PLATFORMS=cpu python benchmarks/mips.py [--rows 200000] [--width 512] [--queries 2048] [--k 10] [--turns 5]

Needs `pip install -e '.[faiss]'`. Writes benchmarks/results/mips-DATE.json and .md.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from report import RESULTS, header, table, write

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.retrieval.hits import Hits
from cm3jax.retrieval.search import ExactIndex, SearchConfig

CORES = 2


def unit_vectors(rows: int, width: int, clusters: int, seed: int) -> np.ndarray:
    """Random directions [rows, width], fp32, around `clusters` centres if that is not 0."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, width), np.float32)
    if clusters:
        centres = np.random.default_rng(0).standard_normal((clusters, width), np.float32)
        vectors = centres[rng.integers(clusters, size=rows)] + 0.9 * vectors
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds(search, queries: np.ndarray, k: int) -> float:
    start = time.perf_counter()
    search(queries, k)
    return time.perf_counter() - start


def compare(options: argparse.Namespace, clusters: int) -> dict[str, Any]:
    """One bank: queries a second of both, and the ratio of each turn."""
    bank = unit_vectors(options.rows, options.width, clusters, 1)
    queries = unit_vectors(options.queries, options.width, clusters, 2)
    config = SearchConfig(query_block=options.query_block, dtype=options.dtype)
    ours = ExactIndex(bank, make_mesh(MeshConfig()), config)
    theirs = faiss.IndexFlatIP(options.width)
    theirs.add(bank)
    found, expected = ours.search(queries, options.k), theirs.search(queries, options.k)
    times: list[tuple[float, float]] = []
    for _ in range(options.turns):
        turns = [
            seconds(search, queries, options.k) for search in (ours.search, theirs.search, theirs.search, ours.search)
        ]
        times.append((turns[0] + turns[3], turns[1] + turns[2]))
    rates = [2 * options.queries / statistics.median(column) for column in zip(*times, strict=True)]
    return {
        "bank": f"{clusters} clusters" if clusters else "random",
        "queries_per_second": {"cm3jax": rates[0], "faiss": rates[1]},
        "ratio": statistics.median(b / a for a, b in times),
        "ratios": [b / a for a, b in times],
        "gflops_of_scores": 2 * options.rows * options.width * rates[0] / 1e9,
        "same_ids": agreement(found, expected[1]),
    }


def agreement(found: Hits, ids: np.ndarray) -> float:
    """Recall of one set of ids against the other; below 1 only where fp32 sums of FAISS order near ties otherwise."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found.ids, ids, strict=True)]))


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    rates, ratios = result["queries_per_second"], result["ratios"]
    return [
        result["bank"],
        f"{rates['cm3jax']:.0f}",
        f"{rates['faiss']:.0f}",
        f"{result['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{result['gflops_of_scores']:.0f}",
        f"{result['same_ids']:.6f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--query-block", type=int, default=SearchConfig.query_block)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=SearchConfig.dtype)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    faiss.omp_set_num_threads(CORES)
    report = header() | {"faiss": faiss.__version__}
    report["banks"] = [compare(options, clusters) for clusters in (0, options.clusters)]
    setting = (
        f"{options.rows} x {options.width} fp32, {options.queries} queries, k = {options.k}, {CORES} cores, FAISS "
        f"{faiss.__version__}, filter in {options.dtype}; {options.turns} turns of ours, theirs, theirs, ours.\n\n"
    )
    columns = ["bank", "cm3jax, queries/s", "FAISS flat, queries/s", "ratio, median (range)", "GFLOP/s", "same ids"]
    rows = [row(result) for result in report["banks"]]
    write("mips", "Exact inner-product search", report, setting + table(columns, rows), options.out)


if __name__ == "__main__":
    main()

"""Exact inner-product search of this package against FAISS `IndexFlatIP`: queries a second, in one process.

Both search the same bank with the same queries on the same cores, in turns of ours, theirs, theirs, ours; each turn
gives one ratio of times, and what is reported is their median with the smallest and the largest.

    python benchmarks/mips.py [--rows 200000] [--width 512] [--queries 2048] [--k 10] [--turns 7] [--out NAME.md]
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import faiss
import jax
import numpy as np

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.retrieval.hits import Hits
from cm3jax.retrieval.search import ExactIndex, SearchConfig


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


def compare(options: argparse.Namespace, clusters: int) -> str:
    """One row of the report."""
    bank = unit_vectors(options.rows, options.width, clusters, 1)
    queries = unit_vectors(options.queries, options.width, clusters, 2)
    config = SearchConfig(query_block=options.query_block, dtype=options.dtype)
    ours = ExactIndex(bank, make_mesh(MeshConfig()), config)
    theirs = faiss.IndexFlatIP(options.width)
    theirs.add(bank)
    found, expected = ours.search(queries, options.k), theirs.search(queries, options.k)
    share = agreement(found, expected[1])
    times: list[tuple[float, float]] = []
    for _ in range(options.turns):
        turns = [
            seconds(search, queries, options.k) for search in (ours.search, theirs.search, theirs.search, ours.search)
        ]
        times.append((turns[0] + turns[3], turns[1] + turns[2]))
    rates = [2 * options.queries / statistics.median(column) for column in zip(*times, strict=True)]
    ratios = sorted(b / a for a, b in times)
    kind = f"{clusters} clusters" if clusters else "random"
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    flops = 2 * options.rows * options.width * rates[0]
    return f"| {kind} | {rates[0]:.0f} | {rates[1]:.0f} | {spread} | {flops / 1e9:.0f} | {share:.6f} |"


def agreement(found: Hits, ids: np.ndarray) -> float:
    """Recall of one set of ids against the other; below 1 only where fp32 sums of FAISS order near ties otherwise."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found.ids, ids, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--query-block", type=int, default=SearchConfig.query_block)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=SearchConfig.dtype)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    lines = [
        f"# Exact inner-product search, {datetime.date.today()}",
        "",
        f"{options.rows} x {options.width} fp32, {options.queries} queries, k = {options.k}; {platform.processor()} "
        f"{device}, {os.cpu_count()} cores, FAISS {faiss.__version__} with {faiss.omp_get_max_threads()} threads, "
        f"jax {jax.__version__}, filter in {options.dtype}; {options.turns} turns of ours, theirs, theirs, ours.",
        "",
        "| bank | ours, queries/s | FAISS flat, queries/s | ratio, median (range) | GFLOP/s of scores | same ids |",
        "| --- | --- | --- | --- | --- | --- |",
        compare(options, 0),
        compare(options, options.clusters),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()

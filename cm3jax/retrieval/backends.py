"""Ways to search a bank, behind one interface: the exact search of this package, or an index of FAISS."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, Int64

from cm3jax.retrieval.hits import Backend, Bank, Hits, ordered
from cm3jax.retrieval.search import ExactIndex, SearchConfig

# Vectors added to a FAISS index at once, so that a memory-mapped bank is not read whole.
ADDED = 1 << 16
# Vectors that FAISS asks for to train one centroid.
TRAINING_VECTORS = 64


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """What searches, and how.

    Attributes:
      kind: `exact` and `faiss-flat` find the best; `faiss-ivfpq` and `faiss-hnsw` find most of them, at low latency.
      lists, probes: cells of IVF and how many a query visits.
      codes: bytes of a vector in PQ; divides its width.
      links, effort: neighbours of a node in HNSW, and how many candidates a query follows.
    """

    kind: Literal["exact", "faiss-flat", "faiss-ivfpq", "faiss-hnsw"] = "exact"
    exact: SearchConfig = SearchConfig()
    lists: int = 1024
    probes: int = 32
    codes: int = 64
    links: int = 32
    effort: int = 128


def open_backend(bank: Bank, config: BackendConfig, mesh: jax.sharding.Mesh) -> Backend:
    """The bank, ready to be searched; `mesh` serves `exact`.

    Raises:
      ValueError: FAISS is not installed, or the bank does not suit the kind.
    """
    if config.kind == "exact":
        return ExactIndex(bank, mesh, config.exact)
    return FaissIndex(bank, config)


class FaissIndex:
    """A bank in an index of FAISS, by inner products; ids are rows of the bank."""

    def __init__(self, bank: Bank, config: BackendConfig):
        try:
            import faiss  # an extra, which exact search does without
        except ModuleNotFoundError:
            raise ValueError(f"retrieval backend {config.kind} needs the extra [faiss]") from None
        self._rows = len(bank)
        self._index = _make(faiss, len(bank), bank.shape[1], config)
        if not self._index.is_trained:
            wanted = min(len(bank), TRAINING_VECTORS * config.lists)
            every = np.linspace(0, len(bank) - 1, wanted).astype(np.int64)
            self._index.train(np.ascontiguousarray(bank[every], np.float32))
        for start in range(0, len(bank), ADDED):
            self._index.add(np.ascontiguousarray(bank[start : start + ADDED], np.float32))

    def search(
        self, queries: Float32[np.ndarray, "Q D"], k: int, exclude: Int64[np.ndarray, " Q"] | None = None
    ) -> Hits:
        """As `hits.Backend.search`, with the scores that FAISS computes."""
        exclude = np.full(len(queries), -1) if exclude is None else np.asarray(exclude)
        wanted = min(k + 1, self._rows)  # the excluded one may be among them
        scores, ids = self._index.search(np.ascontiguousarray(queries, np.float32), wanted)
        return ordered(ids.astype(np.int64), scores, k, exclude)


def _make(faiss: Any, rows: int, width: int, config: BackendConfig) -> Any:
    if config.kind == "faiss-flat":
        return faiss.IndexFlatIP(width)
    if config.kind == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(width, config.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = config.effort
        return index
    if width % config.codes or config.lists > rows:
        raise ValueError(
            f"retrieval backend {config.kind}: codes {config.codes} must divide the width {width}, "
            f"and lists {config.lists} be at most the rows {rows}"
        )
    index = faiss.index_factory(width, f"IVF{config.lists},PQ{config.codes}", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = config.probes
    return index

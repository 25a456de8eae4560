"""Exact search: equal to the definition whatever the bank, the mesh, the memory and the cuts; FAISS beside it."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.retrieval.backends import BackendConfig, FaissIndex, open_backend
from cm3jax.retrieval.filter import filter_step
from cm3jax.retrieval.hits import ordered
from cm3jax.retrieval.search import ExactIndex, SearchConfig

SMALL = SearchConfig(query_block=64, tile=256, bin_size=8, spare=6)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def random_bank(rows, width, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(rows, width)))


def clustered_bank(rows, width, seed=0):
    """A hundred rows around each centre, a tenth of them exact copies of others."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, rows // 100), width))
    bank = unit(centres[rng.integers(len(centres), size=rows)] + 0.1 * rng.normal(size=(rows, width)))
    copies = rng.choice(rows, rows // 10, replace=False)
    bank[copies] = bank[rng.integers(rows, size=len(copies))]
    return bank


def by_definition(bank, queries, k, exclude=None):
    exact = np.stack([(bank.astype(np.float64) * query).sum(axis=1).astype(np.float32) for query in queries])
    everything = np.tile(np.arange(len(bank)), (len(queries), 1))
    return ordered(everything, exact, k, np.full(len(queries), -1) if exclude is None else exclude)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


def mesh_of(devices):
    return make_mesh(MeshConfig(data=devices), jax.devices()[:devices])


@pytest.fixture(scope="module", params=[random_bank, clustered_bank], ids=["random", "clustered"])
def case(request):
    """A bank, queries that are partly rows of it, what not to find, and the ten that should be found."""
    bank = request.param(3000, 32)
    queries = np.concatenate([bank[:20], random_bank(30, 32, 1)])
    exclude = np.concatenate([np.arange(20), np.full(30, -1)])
    return bank, queries, exclude, by_definition(bank, queries, 10, exclude)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_result_is_by_definition_on_any_number_of_devices(case, devices):
    bank, queries, exclude, expected = case
    assert_same(ExactIndex(bank, mesh_of(devices), SMALL).search(queries, 10, exclude), expected)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32"}, {"tile": 64, "bin_size": 32}, {"bin_size": 1}, {"query_block": 32, "spare": 1}]
)
def test_cuts_and_precision_change_nothing(case, changes):
    bank, queries, exclude, expected = case
    index = ExactIndex(bank, mesh_of(2), dataclasses.replace(SMALL, **changes))
    assert_same(index.search(queries, 10, exclude), expected)


def test_a_bank_of_four_times_the_memory_streams(case):
    bank, queries, exclude, expected = case
    memory = bank.size * 2 // 2 // 4  # two bytes a value, half of the rows on each of two devices
    index = ExactIndex(bank, mesh_of(2), dataclasses.replace(SMALL, memory_bytes=memory, tile=128))
    assert index.chunks >= 8 and 2 * index.chunk_bytes <= memory
    assert_same(index.search(queries, 10, exclude), expected)


def test_no_row_is_hidden_by_a_better_one_of_its_bin():
    bank = random_bank(1024, 16)
    query = random_bank(1, 16, 7)
    # Rows 3, 3 + 32, 3 + 64 ... are one bin of SMALL's tile of 256: all eight are the best.
    best = 3 + 32 * np.arange(8)
    bank[best] = unit(query + 0.01 * np.random.default_rng(3).normal(size=(8, 16)))
    found = ExactIndex(bank, mesh_of(1), SMALL).search(query, 8)
    assert set(found.ids[0]) == set(best.tolist())
    assert_same(found, by_definition(bank, query, 8))


def test_a_bank_of_equal_rows_gives_the_first_ids():
    bank = np.tile(random_bank(1, 16), (2000, 1))
    found = ExactIndex(bank, mesh_of(4), SMALL).search(bank[:3], 5, np.array([0, 2, 1999]))
    assert found.ids.tolist() == [[1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (1, 3), (5, 10), (300, 300)])
def test_small_banks_and_large_k(rows, k):
    bank, queries = random_bank(rows, 8), random_bank(4, 8, 1)
    exclude = np.array([-1, 0, 0, -1])
    found = ExactIndex(bank, mesh_of(8), SMALL).search(queries, k, exclude)
    assert_same(found, by_definition(bank, queries, k, exclude))
    assert np.all(found.ids[1:3] != 0)
    assert np.all((found.ids == -1) == np.isneginf(found.scores))


def test_scores_of_the_filter_are_within_the_bound():
    """The bound that the proof rests on, for vectors of very different lengths."""
    rng = np.random.default_rng(0)
    bank = (random_bank(512, 64) * rng.lognormal(0, 2, (512, 1))).astype(np.float32)
    queries = (random_bank(32, 64, 1) * rng.lognormal(0, 2, (32, 1))).astype(np.float32)
    for dtype in ("bfloat16", "float32"):
        index = ExactIndex(bank, mesh_of(1), SearchConfig(tile=512, bin_size=1, dtype=dtype))
        rough, ids, _ = jax.device_get(index._filter(queries, 512))
        exact = np.take_along_axis(queries.astype(np.float64) @ bank.T.astype(np.float64), ids[0].astype(int), axis=1)
        error = np.abs(rough[0] - exact).max(axis=1) / index._error(queries)
        assert 0.001 < error.max() <= 1


def test_bad_input_is_named():
    bank = random_bank(64, 8)
    with pytest.raises(ValueError, match=r"bank of shape \(0, 8\)"):
        ExactIndex(bank[:0], mesh_of(1))
    with pytest.raises(ValueError, match="rows 0 to 63 is not finite"):
        ExactIndex(np.where(np.arange(8) == 3, np.nan, bank).astype(np.float32), mesh_of(1))
    with pytest.raises(ValueError, match="expected room for two times 32 rows: 1024"):
        ExactIndex(bank, mesh_of(1), SearchConfig(memory_bytes=64))
    with pytest.raises(ValueError, match=r"queries \(2, 7\) and k 1, expected \[Q, 8\]"):
        ExactIndex(bank, mesh_of(1)).search(bank[:2, :7], 1)
    with pytest.raises(ValueError, match="bin_size 12, expected a power of two"):
        SearchConfig(bin_size=12)
    with pytest.raises(ValueError, match="tile 100, expected a multiple"):
        SearchConfig(tile=100)


def test_one_step_is_compiled_for_one_shape():
    filter_step.cache_clear()
    index = ExactIndex(random_bank(600, 8), mesh_of(2), SMALL)
    for count in (33, 40, 64):
        index.search(random_bank(count, 8, 2), 3)
    assert filter_step.cache_info().currsize == 1


@pytest.mark.parametrize(("kind", "least"), [("faiss-flat", 1.0), ("faiss-hnsw", 0.5), ("faiss-ivfpq", 0.2)])
def test_faiss_finds_what_it_should(case, kind, least):
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    bank, queries, exclude, expected = case
    found = open_backend(bank, BackendConfig(kind, lists=4, probes=4, codes=4), mesh_of(1)).search(queries, 10, exclude)
    assert np.all(found.ids != exclude[:, None])
    # Of equal rows any will do, so what counts is the score.
    exact = np.stack([bank[row].astype(np.float64) @ q for row, q in zip(found.ids, queries, strict=True)])
    assert np.mean(exact >= expected.scores[:, -1:] - 1e-6) >= least
    assert kind == "faiss-ivfpq" or np.all(np.abs(found.scores - exact) < 1e-6)


def test_exact_is_the_default(case):
    bank, queries, exclude, expected = case
    assert_same(open_backend(bank, BackendConfig(exact=SMALL), mesh_of(1)).search(queries, 10, exclude), expected)


def test_impossible_indexes_are_named():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="codes 5 must divide the width 8"):
        FaissIndex(random_bank(64, 8), BackendConfig("faiss-ivfpq", lists=4, codes=5))


@pytest.mark.slow
@pytest.mark.parametrize("make", [random_bank, clustered_bank])
def test_ids_are_those_of_faiss_on_a_large_bank(make):
    """FAISS sums in fp32: where ids differ, the scores of both must be within its rounding."""
    faiss = pytest.importorskip("faiss")
    bank, k = make(200_000, 512), 10
    queries = np.concatenate([bank[:128], random_bank(128, 512, 1)])
    index = faiss.IndexFlatIP(512)
    index.add(bank)
    scores, ids = index.search(queries, k)
    expected = ordered(ids.astype(np.int64), scores, k, np.full(len(queries), -1))
    for devices, parts in ((1, 1), (8, 1), (1, 4), (4, 4), (2, 1)):
        memory = bank.size * 2 // devices // parts + 512 * 2 * 8192 // parts
        index = ExactIndex(bank, mesh_of(devices), SearchConfig(memory_bytes=memory))
        assert (index.chunks > parts) if parts > 1 else (index.chunks == 1)
        found = index.search(queries, k)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=2e-6)
        near = np.abs(np.diff(found.scores, axis=1)) < 2e-6
        tied = np.pad(near, ((0, 0), (1, 0))) | np.pad(near, ((0, 0), (0, 1)), constant_values=True)
        assert np.all((found.ids == expected.ids) | tied)
        assert np.mean(found.ids == expected.ids) > 0.5

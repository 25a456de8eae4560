"""Every attention kernel against plain loops and against the dense one, forward and backward."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cm3jax.kernels.attention import Mask, attention, dispatch
from cm3jax.kernels.attention.chunked import chunked_attention
from cm3jax.kernels.attention.dense import dense_attention
from cm3jax.kernels.attention.splash import splash_attention
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import ACTIVATIONS


def random_qkv(queries, keys, heads=4, groups=2, width=8, rows=2):
    shapes = [(rows, queries, heads, width), (rows, keys, groups, width), (rows, keys, groups, width)]
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments_of(rows, length):
    """Runs of random lengths, other ones in each row; numbers need not rise."""
    rng = np.random.default_rng(1)
    return np.stack(
        [np.repeat(rng.permutation(length), rng.integers(1, length // 2, length))[:length] for _ in range(rows)]
    )


def by_loops(q, k, v, sees):
    """Attention of one query and one head at a time, in float64; `sees(b, t)` lists the keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    repeats = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = sees(b, t)
        scores = k[b, seen, h // repeats] @ q[b, t, h] / np.sqrt(q.shape[3])
        shares = np.exp(scores - scores.max())
        out[b, t, h] = shares @ v[b, seen, h // repeats] / shares.sum()
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dense_with_positions_against_plain_loops(groups):
    q, k, v = random_qkv(6, 9, groups=groups)
    positions = np.array([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]])
    found = jax.jit(dense_attention)(q, k, v, Mask(jnp.asarray(positions)))
    np.testing.assert_allclose(found, by_loops(q, k, v, lambda b, t: range(positions[b, t] + 1)), atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_dense_with_segments_and_window_against_plain_loops(window):
    (q, k, v), segments = random_qkv(12, 12), segments_of(2, 12)

    def sees(b, t):
        return [s for s in range(t + 1) if segments[b, s] == segments[b, t] and (window is None or t - s < window)]

    found = jax.jit(dense_attention)(q, k, v, Mask(segments=jnp.asarray(segments), window=window))
    np.testing.assert_allclose(found, by_loops(q, k, v, sees), atol=1e-6)


def test_dense_equals_the_library_function():
    q, k, v = random_qkv(12, 12)
    theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
    np.testing.assert_allclose(jax.jit(dense_attention)(q, k, v, Mask()), theirs, atol=1e-6)


def test_a_window_of_a_cache_counts_from_the_queries_positions():
    q, k, v = random_qkv(1, 9)
    found = jax.jit(dense_attention)(q, k, v, Mask(jnp.array([[4], [7]]), window=3))
    np.testing.assert_allclose(found, by_loops(q, k, v, lambda b, t: [[2, 3, 4], [5, 6, 7]][b]), atol=1e-6)


def outcome(attend, q, k, v):
    probe = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
    return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(probe * attend(*qkv)), argnums=(0, 1, 2)))(q, k, v)


def assert_agree(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


MASKS = {
    "causal": lambda rows, length: Mask(),
    "window": lambda rows, length: Mask(window=length // 3),
    "segments": lambda rows, length: Mask(segments=jnp.asarray(segments_of(rows, length))),
    "both": lambda rows, length: Mask(segments=jnp.asarray(segments_of(rows, length)), window=length // 3),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block", [5, 12, 64])
def test_chunked_agrees_with_dense_forward_and_backward(mask, block):
    (q, k, v), mask = random_qkv(37, 37), MASKS[mask](2, 37)
    dense = outcome(lambda q, k, v: dense_attention(q, k, v, mask), q, k, v)
    chunks = outcome(lambda q, k, v: chunked_attention(q, k, v, mask, block), q, k, v)
    assert_agree(chunks, dense, 1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_splash_agrees_with_dense_forward_and_backward(mask):
    (q, k, v), mask = random_qkv(256, 256, heads=2, groups=1, width=16, rows=1), MASKS[mask](1, 256)
    dense = outcome(lambda q, k, v: dense_attention(q, k, v, mask), q, k, v)
    splash = outcome(lambda q, k, v: splash_attention(q, k, v, mask, interpret=True), q, k, v)
    assert_agree(splash, dense, 1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [64, 96, 128])
def test_cudnn_agrees_with_dense_forward_and_backward(mask, width):
    if jax.default_backend() != "gpu":
        pytest.skip("NO GPU: cuDNN's kernel was not run, so this test checked nothing")
    (q, k, v), mask = random_qkv(256, 256, width=width), MASKS[mask](2, 256)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]

    def results(attend, inputs):
        return [jax.jit(attend)(*inputs), *outcome(attend, *inputs)[1]]

    found = results(lambda q, k, v: attention(q, k, v, mask, "cudnn"), halves)
    exact = [x.astype(jnp.float32) for x in halves]
    for a, b in zip(found, results(lambda q, k, v: dense_attention(q, k, v, mask), exact), strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 1e-2 * np.linalg.norm(b)


@pytest.mark.parametrize("kernel", ["chunked", "splash"])
def test_a_mesh_of_eight_devices_gives_the_same(kernel):
    (q, k, v), mask = random_qkv(128, 128, rows=4), MASKS["segments"](4, 128)
    run = {"chunked": chunked_attention, "splash": functools.partial(splash_attention, interpret=True)}[kernel]
    expected = outcome(lambda q, k, v: dense_attention(q, k, v, mask), q, k, v)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, ACTIVATIONS["heads"])) for x in (q, k, v)]
        assert_agree(outcome(lambda q, k, v: run(q, k, v, mask), *placed), expected, 1e-4)


def test_chunked_moves_nothing_between_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = NamedSharding(mesh, ACTIVATIONS["heads"])
    shapes = [jax.ShapeDtypeStruct((4, 300, heads, 8), jnp.float32, sharding=layout) for heads in (4, 2, 2)]

    def loss(q, k, v):
        return jnp.sum(jnp.square(chunked_attention(q, k, v, Mask())))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=layout).lower(*shapes).compile().as_text()
    assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if kind in text]


def test_chunked_row_sums_are_rounded_on_no_platform():
    q, k, v = random_qkv(32, 32)
    slope = jax.jit(jax.grad(lambda q: jnp.sum(jnp.square(chunked_attention(q, k, v, Mask(), 16)))))
    lines = slope.trace(q).lower(lowering_platforms=("tpu",)).as_text().splitlines()
    assert len([line for line in lines if "dot_general" in line and "[HIGHEST, HIGHEST]" in line]) == 1


def test_chunked_in_bfloat16_follows_float32():
    q, k, v = random_qkv(300, 300, rows=1)
    halves = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    found = jax.jit(attention, static_argnums=4)(*halves, Mask(), "chunked")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), dense_attention(q, k, v, Mask()), atol=0.03)


def test_scores_of_the_whole_sequence_are_never_held():
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    loss = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, Mask(), "chunked")), argnums=(0, 1, 2))
    compiled = jax.jit(loss).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length * length * 4 / 16


def test_a_kernel_that_cannot_run_is_replaced_aloud_once(caplog):
    q, k, v = random_qkv(16, 16)
    dispatch._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = attention(q, k, v, Mask(), "splash")
    np.testing.assert_array_equal(found, attention(q, k, v, Mask(), "chunked"))
    message = "attention: splash (splash was asked for) cannot run: it runs on tpu only, these devices are cpu; chunked"
    assert [record.message.startswith(message) for record in caplog.records] == [True]
    caplog.clear()
    attention(q, k, v, Mask())
    assert not caplog.records


class Devices:
    """A mesh of devices that are not here."""

    empty = False

    def __init__(self, platform, tensor=1, batch=1):
        self.shape, self.size = {"tensor": tensor}, tensor * batch
        self.abstract_device = type("Device", (), {"platform": platform})


@pytest.mark.parametrize(
    ("devices", "length", "dtype", "backend", "expected"),
    [
        (Devices("tpu"), 256, "bfloat16", "auto", "splash"),
        (Devices("tpu"), 250, "bfloat16", "auto", "chunked"),
        (Devices("tpu", tensor=4), 256, "bfloat16", "auto", "chunked"),
        (Devices("tpu", batch=4), 256, "bfloat16", "splash", "chunked"),
        (Devices("tpu"), 256, "bfloat16", "dense", "dense"),
        (Devices("cuda"), 256, "bfloat16", "auto", "cudnn"),
        (Devices("cuda"), 256, "float32", "auto", "chunked"),
        (Devices("cuda"), 256, "bfloat16", "splash", "chunked"),
        (Devices("cpu"), 256, "float32", "auto", "chunked"),
    ],
)
def test_the_kernel_goes_by_the_devices_of_the_mesh(monkeypatch, devices, length, dtype, backend, expected):
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: devices)
    q, k, _ = random_qkv(length, length)
    assert dispatch.choose(jnp.asarray(q, dtype), jnp.asarray(k, dtype), Mask(), backend) == expected


def test_masks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="window 0, expected at least 1"):
        Mask(window=0)
    with pytest.raises(ValueError, match="segments are of a whole sequence"):
        Mask(jnp.zeros((1, 4), int), jnp.zeros((1, 4), int))

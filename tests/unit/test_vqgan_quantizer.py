"""Vector quantisation: nearest codes, losses, statistics, revival."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3jax.models.quantizer import VectorQuantizer, code_counts, nearest_codes, perplexity, revive, usage_share


def make(codes=6, dim=3, **options):
    options = {"beta": 0.25, "legacy_beta": False, "l2_normalized": False} | options
    quantizer = VectorQuantizer(codes, dim, rngs=nnx.Rngs(0), **options)
    quantizer.embedding[...] = jnp.asarray(np.random.default_rng(1).standard_normal((codes, dim)), jnp.float32)
    return quantizer


@pytest.fixture
def latents():
    return jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 4, 3)), jnp.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_nearest_is_the_nearest(seed, scale):
    rng = np.random.default_rng(seed)
    z, codebook = rng.standard_normal((10, 4)) * scale, rng.standard_normal((7, 4)) * scale
    distances = np.square(z[:, None] - codebook[None]).sum(-1)
    found = np.asarray(nearest_codes(jnp.asarray(z, jnp.float32), jnp.asarray(codebook, jnp.float32)))
    chosen = distances[np.arange(10), found]
    assert np.all(chosen <= distances.min(1) + 1e-5 * scale**2)  # fp32 may not tell nearer ties apart


def test_the_lowest_of_equal_codes_is_chosen():
    codebook = jnp.asarray([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest_codes(jnp.asarray([[0.9, 0.1], [0.0, 0.0]]), codebook).tolist() == [1, 1]


@pytest.mark.parametrize(("legacy", "on_codes", "on_latents"), [(False, 1.0, 0.25), (True, 0.25, 1.0)])
def test_beta_weighs_the_right_term(latents, legacy, on_codes, on_latents):
    quantizer = make(legacy_beta=legacy)
    graph, state = nnx.split(quantizer)

    def loss(params, z):
        return nnx.merge(graph, params)(z).loss

    codebook = np.asarray(quantizer.embedding[...])
    gaps = codebook[np.asarray(quantizer(latents).codes)] - latents
    assert quantizer(latents).loss == pytest.approx((on_codes + on_latents) * float(jnp.mean(gaps**2)), rel=1e-6)
    to_latents = jax.grad(loss, argnums=1)(nnx.to_pure_dict(state), latents)
    np.testing.assert_allclose(to_latents, -on_latents * 2 * gaps / gaps.size, rtol=1e-5)
    to_codes = jax.grad(loss)(nnx.to_pure_dict(state), latents)["embedding"]
    expected = np.zeros_like(codebook)
    np.add.at(expected, np.asarray(quantizer(latents).codes), on_codes * 2 * np.asarray(gaps) / gaps.size)
    np.testing.assert_allclose(to_codes, expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_passes_straight_through(latents):
    quantizer = make()
    weights = jnp.arange(latents.size, dtype=jnp.float32).reshape(latents.shape)
    assert np.array_equal(jax.grad(lambda z: jnp.sum(weights * quantizer(z).z_q))(latents), weights)
    np.testing.assert_allclose(quantizer(latents).z_q, quantizer.lookup(quantizer(latents).codes), atol=1e-6)


def test_normalized_codes_ignore_length(latents):
    quantizer = make(l2_normalized=True)
    near, far = quantizer(latents), quantizer(100 * latents)
    assert np.array_equal(near.codes, far.codes)
    np.testing.assert_allclose(np.linalg.norm(near.z_q, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(near.z_q, quantizer.lookup(near.codes), atol=1e-6)
    codebook = np.asarray(quantizer.embedding[...])
    unit = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
    assert np.array_equal(near.codes, np.einsum("bhwe,ke->bhwk", latents, unit).argmax(-1))


def test_statistics():
    counts = code_counts(jnp.asarray([[0, 1], [1, 3]]), 4)
    assert counts.tolist() == [1, 2, 0, 1]
    assert usage_share(counts) == 0.75
    assert perplexity(counts) == pytest.approx(2**1.5, rel=1e-6)  # entropy 1.5 bits
    assert perplexity(jnp.full(8, 5.0)) == pytest.approx(8, rel=1e-6)
    assert perplexity(jnp.asarray([9.0, 0.0])) == pytest.approx(1, rel=1e-6)


CODEBOOK = jnp.arange(12, dtype=jnp.float32).reshape(4, 3) + 100
COUNTS = jnp.asarray([0.0, 2.0, 0.0, 0.0])
IDLE = jnp.asarray([9, 9, 8, 3])


def test_only_overdue_codes_move_and_only_onto_latents(latents):
    moved = revive(CODEBOOK, IDLE, COUNTS, latents, jax.random.key(0), window=10)
    assert moved.dead.tolist() == [True, False, False, False]
    assert moved.idle.tolist() == [0, 0, 9, 4]
    assert np.array_equal(moved.codebook[1:], CODEBOOK[1:])
    assert np.asarray(moved.codebook[0]).tolist() in np.asarray(latents).reshape(-1, 3).tolist()


def test_revival_follows_the_key(latents):
    everything = jnp.full(4, 10)
    first, again, other = (
        revive(CODEBOOK, everything, jnp.zeros(4), latents, jax.random.key(seed), window=10) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.codebook, again.codebook)
    assert not np.array_equal(first.codebook, other.codebook)
    assert len(np.unique(first.codebook, axis=0)) == 4  # no two codes on one latent


def test_fewer_latents_than_codes_still_revive(latents):
    moved = revive(CODEBOOK, jnp.full(4, 10), jnp.zeros(4), latents[:1, :1, :2], jax.random.key(0), window=10)
    assert moved.dead.all() and np.all(moved.codebook < 50)


def test_broken_latents_move_nothing():
    broken = jnp.full((1, 4, 4, 3), jnp.nan)
    moved = revive(CODEBOOK, IDLE, COUNTS, broken, jax.random.key(0), window=1)
    assert np.array_equal(moved.codebook, CODEBOOK) and not moved.dead.any()

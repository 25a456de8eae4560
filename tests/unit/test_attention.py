import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.kernels.attention import blockwise_attention, dense_attention
from cm3jax.models.attention import attention
from cm3jax.models.layers import rotate, rotation


def random_qkv(queries, keys, heads=4, groups=2, width=8, rows=2):
    shapes = [(rows, queries, heads, width), (rows, keys, groups, width), (rows, keys, groups, width)]
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_loops(q, k, v, positions):
    """Attention of one query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    repeats = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = int(positions[b][t]) + 1
        scores = k[b, :seen, h // repeats] @ q[b, t, h] / np.sqrt(q.shape[3])
        shares = np.exp(scores - scores.max())
        out[b, t, h] = shares @ v[b, :seen, h // repeats] / shares.sum()
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dense_attention_against_plain_loops(groups):
    q, k, v = random_qkv(6, 9, groups=groups)
    positions = np.array([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]])
    found = jax.jit(dense_attention)(q, k, v, positions)
    np.testing.assert_allclose(found, by_loops(q, k, v, positions), atol=1e-6)


def test_dense_attention_equals_the_library_function():
    q, k, v = random_qkv(12, 12)
    theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
    np.testing.assert_allclose(jax.jit(dense_attention)(q, k, v, np.arange(12)[None]), theirs, atol=1e-6)


@pytest.mark.parametrize("block", [5, 12, 64])
def test_blockwise_twin_agrees_forward_and_backward(block):
    q, k, v = random_qkv(12, 12)
    probe = np.random.default_rng(9).normal(size=q.shape)

    def outcome(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(probe * attend(*qkv)), argnums=(0, 1, 2)))(q, k, v)

    dense = outcome(lambda q, k, v: dense_attention(q, k, v, jnp.arange(12)[None]))
    blocks = outcome(lambda q, k, v: blockwise_attention(q, k, v, block))
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(blocks), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_dispatcher_without_positions_is_causal_over_several_blocks():
    q, k, v = random_qkv(300, 300, rows=1)
    dense = jax.jit(dense_attention)(q, k, v, np.arange(300)[None])
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), dense, atol=1e-6)


def test_rotation_depends_only_on_the_distance_of_positions():
    q, k, _ = random_qkv(1, 1, groups=4, rows=1)

    @jax.jit
    def score(at_q, at_k):
        turned_q = rotate(q, rotation(jnp.array([[at_q]]), 8, 10_000.0))
        return jnp.einsum("bthk,bshk->h", turned_q, rotate(k, rotation(jnp.array([[at_k]]), 8, 10_000.0)))

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-5)
    assert jnp.max(jnp.abs(score(7, 3) - score(8, 3))) > 1e-3


def test_rotation_turns_pairs_by_the_stated_angles():
    turned = rotate(jnp.array([[[[1.0, 1.0, 0.0, 0.0]]]]), rotation(jnp.array([[2]]), 4, 100.0))
    # Pairs (0, 2) and (1, 3); angles 2 and 2 / sqrt(100).
    expected = [np.cos(2.0), np.cos(0.2), np.sin(2.0), np.sin(0.2)]
    np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-6)

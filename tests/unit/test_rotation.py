import jax
import jax.numpy as jnp
import numpy as np

from cm3jax.models.layers import rotate, rotation


def test_rotation_depends_only_on_the_distance_of_positions():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 4, 8)).astype(np.float32)

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

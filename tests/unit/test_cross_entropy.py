import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.kernels.cross_entropy import cross_entropy, reference_cross_entropy

TOKENS, WIDTH, VOCAB = 37, 16, 50


def problem():
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(VOCAB, WIDTH))
    weights = rng.uniform(size=TOKENS)
    weights[5] = 0.0
    floats = [x.astype(np.float32) for x in (hidden, unembedding, weights)]
    return floats[0], floats[1], rng.integers(0, VOCAB, TOKENS), floats[2]


def test_reference_against_numpy():
    hidden, unembedding, targets, weights = problem()
    logits = hidden.astype(np.float64) @ unembedding.T
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - logits[np.arange(TOKENS), targets]
    found = jax.jit(reference_cross_entropy)(hidden, unembedding, targets, weights, 0.01)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(found.loss_sum, np.sum(weights * (nll + 0.01 * log_z**2)), rtol=1e-5)
    np.testing.assert_allclose(found.weight_sum, np.sum(weights), rtol=1e-6)


@pytest.mark.parametrize("chunk", [8, 36, 37])
def test_chunks_give_the_reference_forward_and_backward(chunk):
    hidden, unembedding, targets, weights = problem()

    def outcome(function, **options):
        def loss(hidden, unembedding):
            out = function(hidden, unembedding, targets, weights, z_loss=0.01, **options)
            return out.loss_sum, out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, unembedding)

    expected = jax.tree.leaves(outcome(reference_cross_entropy))
    found = jax.tree.leaves(outcome(cross_entropy, chunk=chunk))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_gradient_flows_through_the_nll_of_one_token():
    hidden, unembedding, targets, weights = problem()

    def nll_of_token_11(hidden):
        return cross_entropy(hidden, unembedding, targets, weights, chunk=8).nll[11]

    grad = np.asarray(jax.jit(jax.grad(nll_of_token_11))(hidden))
    shares = np.exp(hidden[11] @ unembedding.T)
    expected = shares @ unembedding / shares.sum() - unembedding[targets[11]]
    np.testing.assert_allclose(grad[11], expected, atol=1e-5)
    assert not np.delete(grad, 11, axis=0).any()


def test_bfloat16_hidden_states_give_fp32_sums():
    hidden, unembedding, targets, weights = problem()
    run = jax.jit(cross_entropy, static_argnames="chunk")
    found = run(hidden.astype(jnp.bfloat16), unembedding, targets, weights, chunk=8)
    exact = run(hidden, unembedding, targets, weights, chunk=8)
    assert found.nll.dtype == found.loss_sum.dtype == jnp.float32
    np.testing.assert_allclose(found.loss_sum, exact.loss_sum, rtol=0.02)


def test_logits_of_all_tokens_are_never_held():
    tokens, vocab = 4096, 2048

    def loss(hidden, unembedding):
        targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
        return cross_entropy(hidden, unembedding, targets, weights, chunk=256).loss_sum

    shapes = [jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (tokens, vocab)]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2

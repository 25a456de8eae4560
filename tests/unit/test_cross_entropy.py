import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.kernels.cross_entropy import cross_entropy, reference_cross_entropy
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import BATCH, WEIGHTS

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


@pytest.mark.parametrize("function", [cross_entropy, reference_cross_entropy])
def test_the_nll_of_a_token_carries_no_gradient(function):
    hidden, unembedding, targets, weights = problem()
    assert not jax.grad(lambda hidden: function(hidden, unembedding, targets, weights).nll[11])(hidden).any()


def test_gradient_of_the_weights_is_the_loss_of_their_tokens():
    hidden, unembedding, targets, weights = problem()
    run = jax.jit(jax.grad(lambda w: 3 * cross_entropy(hidden, unembedding, targets, w, z_loss=0.01, chunk=8).loss_sum))
    reference = jax.grad(lambda w: 3 * reference_cross_entropy(hidden, unembedding, targets, w, z_loss=0.01).loss_sum)
    np.testing.assert_allclose(run(weights), reference(weights), rtol=1e-5)


MESHES = {
    "one": MeshConfig(data=1),
    "tensor": MeshConfig(data=1, tensor=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def on_mesh(config):
    """The mesh, and the shardings of hidden states, output matrix and what each token has."""
    mesh = make_mesh(config, jax.devices()[: 1 if config == MESHES["one"] else 8])
    return mesh, [NamedSharding(mesh, spec) for spec in (P(BATCH, None), WEIGHTS["embedding"], P(BATCH))]


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_reference_forward_and_backward(name):
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(88, 16)), rng.normal(size=(48, 16))
    targets, weights = rng.integers(0, 48, 88), rng.uniform(size=88).astype(np.float32)
    hidden, unembedding = hidden.astype(np.float32), unembedding.astype(np.float32)

    def outcome(function, *arguments):
        def loss(hidden, unembedding, targets, weights):
            out = function(hidden, unembedding, targets, weights, z_loss=0.01)
            return out.loss_sum / out.weight_sum, out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arguments)

    expected = outcome(reference_cross_entropy, hidden, unembedding, targets, weights)
    mesh, layouts = on_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        placed = jax.device_put((hidden, unembedding, targets, weights), (*layouts, layouts[2]))
        found = outcome(functools.partial(cross_entropy, chunk=32), *placed)
        sums = jax.jit(functools.partial(cross_entropy, z_loss=0.01, chunk=32))(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(sums.loss_sum, expected[0][1].loss_sum, rtol=1e-5)


def test_no_logits_travel_between_devices():
    mesh, layouts = on_mesh(MESHES["all"])
    tokens, width, vocab, chunk = 1024, 16, 512, 256

    def loss(hidden, unembedding, targets, weights):
        return cross_entropy(hidden, unembedding, targets, weights, z_loss=0.01, chunk=chunk).loss_sum

    shapes = [((tokens, width), jnp.float32), ((vocab, width), jnp.float32), ((tokens,), int), ((tokens,), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(*s, sharding=at) for s, at in zip(shapes, (*layouts, layouts[2]), strict=True)]
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=tuple(layouts[:2]))
        text = step.lower(*arguments).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? (?:{kinds})(?:-start)?\(", text)
    payloads = [math.prod(int(n) for n in shape.split(",") if n) for shape in found]
    assert len(payloads) >= 4
    # A chunk of logits on one device; the largest payloads are the gradients of hidden states and output matrix.
    assert max(payloads) <= max(tokens // 4 * width, vocab // 2 * width) < (chunk // 4) * (vocab // 2)


def test_sizes_that_the_mesh_does_not_divide_are_refused():
    hidden, unembedding, targets, weights = problem()
    with (
        jax.set_mesh(make_mesh(MESHES["all"])),
        pytest.raises(
            ValueError, match="37 tokens, a vocabulary of 50 and a width of 16, expected multiples of 4, 2 and 2"
        ),
    ):
        cross_entropy(hidden, unembedding, targets, weights)


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

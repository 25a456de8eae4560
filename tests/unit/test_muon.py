"""Muon against NumPy, with stacked layers and heads, and beside AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3jax.optim import OptimConfig, make_optimizer
from cm3jax.optim.muon import muon_direction

SHAPES = {
    "qkv": (3, 8, 2, 6),  # [layers, d_model, heads, head_dim]
    "attention_out": (3, 2, 6, 8),
    "mlp_up": (3, 8, 32),
    "mlp_down": (32, 8),
}
AS_MATRICES = {"qkv": (3, 8, 12), "attention_out": (3, 12, 8), "mlp_up": (3, 8, 32), "mlp_down": (1, 32, 8)}
MOMENTUM = 0.9


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def newton_schulz(x):
    """Five quintic steps on one matrix, in float64."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / np.linalg.norm(wide)
    for _ in range(5):
        a = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * a + 2.0315 * a @ a) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def by_numpy(name, history):
    """The direction after the gradients of `history`, from the formulas."""
    mean = np.zeros(SHAPES[name])
    for count, gradient in enumerate(history, start=1):
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        ahead = mean / (1 - MOMENTUM ** (count + 1))
        nesterov = MOMENTUM * ahead + (1 - MOMENTUM) * gradient / (1 - MOMENTUM**count)
    matrices = nesterov.reshape(AS_MATRICES[name])
    scale = 0.2 * np.sqrt(max(matrices.shape[1:]))
    return (scale * np.stack([newton_schulz(m) for m in matrices])).reshape(SHAPES[name])


@pytest.fixture(scope="module")
def directions():
    """What two updates give, for every kind of matrix at once."""
    names = {(jax.tree_util.DictKey(name),): name for name in SHAPES}
    muon = muon_direction(MOMENTUM, "float32", names)
    update = jax.jit(muon.update)
    first, state = update(gradients(0), muon.init(gradients(0)))
    second, _ = update(gradients(1), state)
    return first, second


@pytest.mark.parametrize("name", SHAPES)
def test_update_equals_numpy(directions, name):
    first, second = directions
    history = [gradients(0)[name].astype(np.float64), gradients(1)[name].astype(np.float64)]
    np.testing.assert_allclose(first[name], by_numpy(name, history[:1]), atol=2e-5)
    np.testing.assert_allclose(second[name], by_numpy(name, history), atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_matrix_comes_out_nearly_orthogonal(directions, name):
    matrices = np.asarray(directions[1][name]).reshape(AS_MATRICES[name])
    values = np.linalg.svd(matrices / (0.2 * np.sqrt(max(matrices.shape[1:]))), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.25


def test_other_weights_are_updated_by_adamw():
    names = {"up": "mlp_up", "embedding": "embedding", "bias": "replicated"}
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(8, 16)), "embedding": rng.normal(size=(32, 8)), "bias": rng.normal(size=16)}
    params = jax.tree.map(jnp.float32, params)
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    found = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(OptimConfig(name=name, warmup_steps=0, decay="constant"), 10, names)
        found[name], _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    np.testing.assert_array_equal(found["muon"]["embedding"], found["adamw"]["embedding"])
    np.testing.assert_array_equal(found["muon"]["bias"], found["adamw"]["bias"])
    assert not np.allclose(found["muon"]["up"], found["adamw"]["up"], atol=1e-5)


def test_updates_are_about_as_large_as_those_of_adamw():
    names = {"up": "mlp_up"}
    optimizer = make_optimizer(
        OptimConfig(name="muon", learning_rate=1.0, warmup_steps=0, decay="constant", weight_decay=0.0), 10, names
    )
    params = {"up": jnp.zeros((64, 256))}
    grads = {"up": jax.random.normal(jax.random.key(0), (64, 256))}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert 0.15 < float(jnp.sqrt(jnp.mean(jnp.square(updates["up"])))) < 0.25
    assert optax.tree.norm(updates) > 0

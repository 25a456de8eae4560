"""Policies of rematerialisation: the same numbers, less and less kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from cm3jax.config import ConfigError, build, to_dict
from cm3jax.kernels.attention import Mask
from cm3jax.kernels.attention.cudnn import FORWARD, cudnn_attention
from cm3jax.models.config import TransformerConfig, chameleon
from cm3jax.models.layers import relu
from cm3jax.models.remat import ACTIVATION, rematerialised
from cm3jax.models.transformer import Transformer
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding, shardings, weight_specs

CONFIG = dataclasses.replace(chameleon(32, 3, 4, 2, 48, 64, 40), init_std=0.2)
POLICIES = ("none", "dots", "offload", "full")
TOKENS = np.random.default_rng(3).integers(0, 64, (4, 40), dtype=np.int32)


@functools.cache
def model():
    return nnx.split(Transformer(CONFIG, nnx.Rngs(0)))[1]


def loss_of(remat, **fields):
    config = dataclasses.replace(CONFIG, remat=remat, **fields)
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[0]
    return lambda params, tokens: jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens) - 0.3))


@functools.cache
def outcome(remat, on_mesh):
    params, tokens = nnx.to_pure_dict(model()), TOKENS
    step = jax.jit(jax.value_and_grad(loss_of(remat)))
    if not on_mesh:
        return step(params, tokens)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, weight_specs(model())))
        return step(placed, jax.device_put(tokens, batch_sharding(mesh)))


@pytest.mark.parametrize("remat", POLICIES[1:])
def test_loss_and_gradients_are_those_of_keeping_everything(remat):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), outcome("none", False), outcome(remat, False)
    )


@pytest.mark.parametrize("remat", ["dots", "offload"])
def test_a_mesh_of_eight_devices_gives_the_same(remat):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), outcome("none", False), outcome(remat, True))


def kept(remat):
    """Bytes between the forward and the backward pass."""
    saved = jax.eval_shape(
        lambda params: jax.vjp(lambda p: loss_of(remat)(p, TOKENS), params)[1], nnx.to_pure_dict(model())
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))


@pytest.mark.parametrize("remat", POLICIES)
def test_layers_without_a_loop_give_the_same(remat):
    found = jax.jit(jax.value_and_grad(loss_of(remat, scan_layers=False)))(nnx.to_pure_dict(model()), TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, outcome(remat, False))


def test_without_a_loop_recomputation_is_kept_apart():
    params = nnx.to_pure_dict(model())
    looped, unrolled = (
        jax.jit(jax.grad(loss_of("dots", scan_layers=scan))).lower(params, TOKENS).as_text() for scan in (True, False)
    )
    # Over layers, forward and backward.
    assert looped.count("stablehlo.while") == unrolled.count("stablehlo.while") + 2
    # Without it the compiler would merge what is recomputed with what was computed, and keep that.
    assert "optimization_barrier" in unrolled and "optimization_barrier" not in looped


def program_of(remat, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[1])
    return str(jax.make_jaxpr(jax.grad(loss_of(remat, **fields)))(params, TOKENS))


@pytest.mark.parametrize("remat", ["dots", "offload"])
def test_relu_is_kept_and_not_computed_again(remat):
    # Once forward; its gradient asks the result, and the product before it is not kept.
    times = [program_of(r, activation="relu").count(f"name={ACTIVATION}") for r in (remat, "full")]
    assert times == [1, 2]


def test_gradients_of_relu():
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-30, 3.0])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu))(x), jax.vmap(jax.grad(jax.nn.relu))(x))
    np.testing.assert_array_equal(relu(x), jax.nn.relu(x))


def test_attention_of_cudnn_is_kept(monkeypatch):
    # What a GPU would be asked for; only traced.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda version: True)

    def forwards(remat):
        def layer(x, w):
            q = (x @ w).reshape(2, 128, 2, 64)
            return cudnn_attention(q, q, q, Mask()).reshape(x.shape), None

        def loss(x, ws):
            return jnp.sum(jax.lax.scan(rematerialised(layer, remat), x, ws)[0].astype(jnp.float32))

        x, ws = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 128, 128), (3, 128, 128)))
        return str(jax.make_jaxpr(jax.grad(loss, argnums=1))(x, ws)).count(f"{FORWARD}[")

    assert {remat: forwards(remat) for remat in POLICIES} == {"none": 1, "dots": 1, "offload": 1, "full": 2}


def test_each_policy_keeps_less_than_the_one_before():
    none, dots, offload, full = map(kept, POLICIES)
    assert none > 1.5 * dots > 1.5 * 1.5 * full
    assert offload == dots


def test_only_offload_writes_to_the_memory_of_the_host():
    for remat in POLICIES:
        assert ("host" in program_of(remat).lower()) == (remat == "offload"), remat


def test_a_policy_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="remat: 'some' is not one of 'none', 'dots', 'offload', 'full'"):
        build(TransformerConfig, {**to_dict(CONFIG), "remat": "some"})

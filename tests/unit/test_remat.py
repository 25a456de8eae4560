"""Policies of rematerialisation: the same numbers, less and less kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.config import ConfigError, build, to_dict
from cm3jax.models.config import TransformerConfig, chameleon
from cm3jax.models.transformer import Transformer
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding, shardings, weight_specs

CONFIG = dataclasses.replace(chameleon(32, 3, 4, 2, 48, 64, 40), init_std=0.2)
POLICIES = ("none", "dots", "offload", "full")
TOKENS = np.random.default_rng(3).integers(0, 64, (4, 40), dtype=np.int32)


@functools.cache
def model():
    return nnx.split(Transformer(CONFIG, nnx.Rngs(0)))[1]


def loss_of(remat):
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(dataclasses.replace(CONFIG, remat=remat), nnx.Rngs(0))))[0]
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


def test_each_policy_keeps_less_than_the_one_before():
    none, dots, offload, full = map(kept, POLICIES)
    assert none > 1.5 * dots > 1.5 * 1.5 * full
    assert offload == dots


def test_only_offload_writes_to_the_memory_of_the_host():
    for remat in POLICIES:
        program = str(jax.make_jaxpr(jax.grad(loss_of(remat)))(nnx.to_pure_dict(model()), TOKENS))
        assert ("host" in program.lower()) == (remat == "offload"), remat


def test_a_policy_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="remat: 'some' is not one of 'none', 'dots', 'offload', 'full'"):
        build(TransformerConfig, {**to_dict(CONFIG), "remat": "some"})

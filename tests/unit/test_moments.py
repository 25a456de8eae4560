"""Moments in 8 and 16 bits: what is stored, that rounding is fair, and that training follows fp32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3jax.optim import OptimConfig, make_optimizer, opt_state_specs
from cm3jax.optim.blocks import (
    OCTAVES,
    Blocks,
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
)
from cm3jax.optim.moments import BLOCK, block_axis, block_size, round_to_bfloat16
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import WEIGHTS, shardings

CONFIG = OptimConfig(learning_rate=3e-2, warmup_steps=0, decay="constant", weight_decay=0.0, b2=0.99)


def draws(decode, encode, x, axis=-1, block=8, count=4096):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(lambda key: decode(encode(x, axis, block, key), axis)))(keys)


def test_signed_blocks_keep_the_largest_and_are_right_in_the_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)) ** 3, jnp.float32)
    found = draws(decode_signed, encode_signed, x)
    largest = jnp.abs(x).reshape(2, 2, 8).max(-1)
    np.testing.assert_allclose(jnp.abs(found[0]).reshape(2, 2, 8).max(-1), largest, rtol=1e-6)
    # A level is at most 2 / 127 of the block's largest away from the next one.
    assert float(jnp.max(jnp.abs(found - x) / jnp.repeat(largest, 8, axis=1))) < 2 / 127
    np.testing.assert_allclose(found.mean(0), x, atol=2e-3 * float(largest.max()))


def test_positive_blocks_are_right_in_the_mean_over_many_octaves_and_never_zero():
    x = jnp.asarray(2.0 ** np.linspace(-28, 3, 16)[None], jnp.float32)
    found = draws(decode_positive, encode_positive, x, block=16)
    np.testing.assert_allclose(found.mean(0), x, rtol=5e-3)
    assert float(jnp.max(jnp.abs(found / x - 1))) < 2 ** (OCTAVES / 254) - 1 + 1e-3
    with_zeros = draws(decode_positive, encode_positive, jnp.array([[0.0, 1.0, 0.0, 4.0]]), block=4, count=2)
    assert float(with_zeros.min()) == pytest.approx(4.0 * 2.0**-OCTAVES)


def test_a_block_of_zeros_stays_zero():
    zeros, key = jnp.zeros((2, 8)), jax.random.key(1)
    assert not decode_signed(encode_signed(zeros, -1, 4, key), -1).any()
    assert not decode_positive(encode_positive(zeros, -1, 4, key), -1).any()


def test_blocks_along_an_inner_axis_are_those_of_the_turned_array():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 5)), jnp.float32)
    found = decode_signed(encode_signed(x, -2, 4, jax.random.key(0)), -2)
    scales = encode_signed(x, -2, 4, jax.random.key(0)).scales
    np.testing.assert_array_equal(scales, jnp.abs(x).reshape(3, 2, 4, 5).max(2))
    np.testing.assert_allclose(found, x, atol=2 / 127 * float(jnp.abs(x).max()))


def test_bfloat16_rounding_is_to_a_neighbour_and_right_in_the_mean():
    x = jnp.array([1.001, -3.3e-5, 0.0, 7.0])
    keys = jax.random.split(jax.random.key(0), 4096)
    found = jax.vmap(lambda key: round_to_bfloat16(x, key))(keys).astype(jnp.float32)
    np.testing.assert_allclose(found.mean(0), x, rtol=3e-4)
    assert set(np.unique(found[:, 0]).tolist()) == {1.0, 1.0078125}
    np.testing.assert_array_equal(found[:, 2:], jnp.broadcast_to(x[2:], (4096, 2)))


def test_blocks_never_lie_along_an_axis_that_fsdp_splits():
    for name, spec in WEIGHTS.items():
        if len(spec) >= 2:
            assert spec[block_axis(name)] != "fsdp", name


@pytest.mark.parametrize(
    ("length", "split", "size"), [(11_008, True, 32), (352, True, 4), (352, False, 32), (7, True, 1)]
)
def test_blocks_divide_their_axis_and_its_parts(length, split, size):
    assert block_size(length, split) == size
    assert block_size(2**16, split) == BLOCK


def problem():
    """Two layers learn a fixed map: weights and a loss."""
    rng = np.random.default_rng(0)
    params = {"up": 0.3 * rng.normal(size=(16, 64)), "down": 0.1 * rng.normal(size=(64, 16)), "bias": np.zeros(64)}
    x, turn = rng.normal(size=(128, 16)), rng.normal(size=(16, 16))
    x, y = x.astype(np.float32), np.tanh(x @ turn).astype(np.float32)

    def loss(params):
        return jnp.mean((jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"] - y) ** 2)

    return jax.tree.map(jnp.float32, params), loss


NAMES = {"up": "mlp_up", "down": "mlp_down", "bias": "replicated"}


def train(config, steps=200):
    params, loss = problem()
    optimizer = make_optimizer(config, steps, NAMES)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (_, state), values = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))((params, optimizer.init(params)))
    return np.asarray(values), state


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_training_follows_that_with_fp32_moments(name, moments):
    exact, _ = train(dataclasses.replace(CONFIG, name=name))
    found, _ = train(dataclasses.replace(CONFIG, name=name, moments=moments))
    assert exact[-1] < 0.15 * exact[0]
    # Not the same path, but as far down: the mean of the last updates.
    np.testing.assert_allclose(found[-20:].mean(), exact[-20:].mean(), rtol=0.15)
    assert not np.array_equal(found, exact)


def test_a_weight_costs_a_byte_a_moment():
    _, state = train(dataclasses.replace(CONFIG, moments="int8"), steps=1)
    blocks = [
        node for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, Blocks)) if isinstance(node, Blocks)
    ]
    assert len(blocks) == 4 and all(block.codes.dtype == jnp.int8 for block in blocks)
    assert {block.codes.shape: block.scales.shape for block in blocks} == {(16, 64): (16, 8), (64, 16): (8, 16)}
    # Vectors are kept exactly.
    assert sum(leaf.shape == (64,) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state)) == 2


def test_a_mesh_of_eight_devices_gives_the_same_update():
    params, loss = problem()
    optimizer = make_optimizer(dataclasses.replace(CONFIG, name="muon", moments="int8"), 10, NAMES)
    grads = jax.grad(loss)(params)
    update = jax.jit(optimizer.update)
    expected, state = update(grads, optimizer.init(params), params)

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = {name: WEIGHTS[spec] for name, spec in NAMES.items()}
    placed, placed_grads = jax.device_put((params, grads), (shardings(mesh, specs),) * 2)
    layout = shardings(mesh, opt_state_specs(optimizer, params, specs))
    with jax.set_mesh(mesh):
        found, placed_state = update(placed_grads, jax.jit(optimizer.init, out_shardings=layout)(placed), placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)
    # A rounding may fall to the other side where the last bits of a sum differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(1.0 * a, 1.0 * b, atol=1), state, placed_state)

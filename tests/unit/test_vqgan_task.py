"""Task `vqgan`: what a step does to weights, average, codebook and discriminator; evaluation; sharding."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.config import build
from cm3jax.data.loader import batches
from cm3jax.models.discriminator import DiscriminatorConfig
from cm3jax.models.vqgan import VQGANConfig
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding, shardings
from cm3jax.tasks.vqgan import ImageDataConfig, VQGANLossConfig, VQGANTask, VQGANTaskConfig

MODEL = VQGANConfig(
    16, 8, (1,), codes=16, res_blocks=1, z_channels=8, embed_dim=4, norm_groups=4, stem_patch=4
)  # one level: what is tested here is the step
CONFIG = VQGANTaskConfig(
    model=MODEL,
    data=ImageDataConfig("scenes:count=64,size=16", valid="scenes:count=32,size=16"),
    loss=VQGANLossConfig(discriminator=DiscriminatorConfig(channels=4, layers=1), disc_start=12),
    batch_size=8,
    learning_rate=1e-2,
    disc_learning_rate=1e-3,
    warmup_steps=4,
    revive_after=5,
    valid_images=16,
)


@pytest.fixture(scope="module")
def task():
    return VQGANTask(CONFIG, seed=0, steps=16)


@pytest.fixture(scope="module")
def step(task):
    return jax.jit(task.step)


@pytest.fixture(scope="module")
def history(task, step):
    """(states, metrics) of 16 updates, the first state before any."""
    states, metrics = [jax.jit(task.init)(jax.random.key(0))], []
    for batch in batches(task.examples, 8, 0, 16):
        state, found = step(states[-1], batch)
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_it_learns(history):
    _, metrics = history
    assert metrics[-1]["reconstruction_loss"] < 0.95 * metrics[0]["reconstruction_loss"]
    assert metrics[-1]["psnr"] > metrics[0]["psnr"] + 0.5
    assert all(np.isfinite(list(found.values())).all() for found in metrics)
    assert all(found["skipped"] == 0 for found in metrics)


def test_the_adversary_sleeps_until_its_start(history):
    states, metrics = history
    assert same(states[0].params["discriminator"], states[12].params["discriminator"])
    assert not same(states[12].params["discriminator"], states[13].params["discriminator"])
    assert [found["adversarial_weight"] > 0 for found in metrics] == [False] * 12 + [True] * 4
    assert metrics[11]["discriminator_loss"] == 0 and metrics[12]["discriminator_loss"] > 0


def test_overdue_codes_move_in_the_weights_and_in_the_average(history):
    states, metrics = history
    used = round(metrics[0]["codebook_usage"] * MODEL.codes)
    assert metrics[0]["revived"] == MODEL.codes - used > 0  # at the start every unused code is overdue
    before, after = (s.params["generator"]["quantize"]["embedding"] for s in states[:2])
    moved = np.asarray(states[1].extra["idle"] == 0) & (np.abs(after - before).max(1) > 0.05)
    assert moved.sum() > 0
    assert np.array_equal(states[1].extra["ema"]["quantize"]["embedding"][moved], after[moved])


def test_the_average_follows_the_weights(history):
    states, _ = history
    kernel = [
        (
            np.asarray(s.params["generator"]["encoder"]["conv_in"]["kernel"]),
            s.extra["ema"]["encoder"]["conv_in"]["kernel"],
        )
        for s in states
    ]
    decay = min(CONFIG.ema_decay, (1 + 16) / (10 + 16))
    np.testing.assert_allclose(kernel[16][1], decay * kernel[15][1] + (1 - decay) * kernel[16][0], rtol=1e-5, atol=1e-7)


def test_a_step_is_a_pure_function(task, step, history):
    states, _ = history
    (batch,) = batches(task.examples, 8, 3, 1)
    assert same(step(states[3], batch)[0], states[4])


def test_a_broken_gradient_is_skipped(task, step, history):
    states, _ = history
    state = states[-1]
    generator = state.params["generator"]
    bias = generator["encoder"]["conv_in"]["bias"].at[0].set(jnp.nan)
    broken = generator | {
        "encoder": generator["encoder"] | {"conv_in": generator["encoder"]["conv_in"] | {"bias": bias}}
    }
    (batch,) = batches(task.examples, 8, 0, 1)
    after, _ = step(state.replace(params=state.params | {"generator": broken}), batch)
    assert after.guard["skipped"] == 1 and after.step == state.step + 1
    assert same(after.params["generator"]["decoder"], generator["decoder"])
    assert same(after.params["generator"]["quantize"], generator["quantize"])
    assert same(after.opt_state, state.opt_state)


def test_evaluation(task, history, one_device_mesh):
    states, _ = history
    with jax.set_mesh(one_device_mesh):
        fresh, trained = task.evaluate(states[0]), task.evaluate(states[-1])
        assert task.evaluate(states[-1]) == trained
    assert set(trained) == {"l1", "psnr", "codebook_perplexity", "codebook_usage"}
    assert trained["psnr"] > fresh["psnr"] + 1
    assert 0 < trained["codebook_usage"] <= 1 <= trained["codebook_perplexity"] <= MODEL.codes


def test_specs_have_the_structure_of_the_state(task):
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    specs = task.state_specs()
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(abstract)
    for spec, leaf in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(abstract), strict=True):
        assert len(spec) <= leaf.ndim


def test_a_sharded_step_equals_an_unsharded_one(task, history):
    """The update that first has an adversary, whose BatchNorm must see the whole batch."""
    states, metrics = history
    (batch,) = batches(task.examples, 8, 12, 1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        layout = shardings(mesh, task.state_specs())
        state, rows = jax.device_put(states[12], layout), jax.device_put(batch, batch_sharding(mesh))
        sharded, found = jax.jit(task.step, out_shardings=(layout, None))(state, rows)
    for name, value in metrics[12].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.array_equal(sharded.extra["idle"], states[13].extra["idle"])


def test_the_fingerprint_covers_what_changes_batches(task):
    def fingerprint(**changes):
        return VQGANTask(dataclasses.replace(CONFIG, **changes), seed=0, steps=1).data_fingerprint()

    assert fingerprint() == task.data_fingerprint() == fingerprint(learning_rate=1.0)
    assert fingerprint(batch_size=4) != task.data_fingerprint()
    assert fingerprint(data=dataclasses.replace(CONFIG.data, flip=False)) != task.data_fingerprint()


def test_missing_perceptual_weights_are_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        VQGANTask(CONFIG, seed=0, steps=1)
    assert sum("LPIPS" in record.message for record in caplog.records) == 1


def test_flops_grow_with_what_is_trained(task):
    assert task.unit == "images" and task.units_per_batch == task.batch_size == 8
    without = VQGANTask(
        dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, discriminator=None)), seed=0, steps=1
    )
    assert 0 < without.flops_per_batch < task.flops_per_batch


def test_built_from_plain_values():
    values = {
        "model": {"resolution": 16, "channels": 32, "channel_multipliers": [1, 2], "codes": 16},
        "data": {"source": "scenes"},
        "loss": {"discriminator": None},
    }
    config = build(VQGANTaskConfig, values)
    assert config.model.channel_multipliers == (1, 2) and config.loss.discriminator is None

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cm3jax.config import ConfigError, build
from cm3jax.optim import OptimConfig, apply_updates, make_optimizer, opt_state_specs, schedule
from cm3jax.state import fresh_state

PARAMS = {"w": jnp.ones((2, 3)), "scale": jnp.ones(3)}
NAMES = {"w": "dense", "scale": "replicated"}


def test_schedule_warms_up_and_decays_to_the_final_ratio():
    rate = schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, decay="linear", final_ratio=0.1), 110)
    assert float(rate(0)) == 0.0
    np.testing.assert_allclose([rate(5), rate(10), rate(60), rate(110)], [0.5, 1.0, 0.55, 0.1], rtol=1e-6)
    cosine = schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, decay="cosine", final_ratio=0.1), 110)
    np.testing.assert_allclose([cosine(10), cosine(60), cosine(110)], [1.0, 0.55, 0.1], rtol=1e-6)


def test_only_matrices_decay():
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, decay="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10, NAMES)
    state = fresh_state(PARAMS, optimizer.init(PARAMS), {})
    state, norm = apply_updates(optimizer, state, jax.tree.map(jnp.zeros_like, PARAMS))
    assert float(norm) == 0
    np.testing.assert_allclose(state.params["w"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(state.params["scale"], PARAMS["scale"])


def test_gradients_are_clipped_by_global_norm():
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, decay="constant", clip_norm=1.0)
    grads = jax.tree.map(lambda x: x * 100.0, PARAMS)
    clipped = optax.clip_by_global_norm(config.clip_norm).update(grads, None)[0]
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-6)
    optimizer = make_optimizer(config, 10, NAMES)
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, "mu")), 0.1, rtol=1e-6)


def test_moments_are_laid_out_like_their_weights():
    optimizer = make_optimizer(OptimConfig(), 10, NAMES)
    specs = opt_state_specs(optimizer, PARAMS, {"w": P("fsdp", "tensor"), "scale": P()})
    assert jax.tree.structure(specs, is_leaf=lambda s: isinstance(s, P)) == jax.tree.structure(optimizer.init(PARAMS))
    assert optax.tree.get(specs, "mu") == {"w": P("fsdp", "tensor"), "scale": P()}
    assert optax.tree.get(specs, "nu") == {"w": P("fsdp", "tensor"), "scale": P()}


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="optim.name is 'mion', expected one of adamw, muon"):
        OptimConfig(name="mion")
    with pytest.raises(ConfigError, match=r"config moments: 'int4' is not one of 'float32', 'bfloat16', 'int8'"):
        build(OptimConfig, {"moments": "int4"})
    with pytest.raises(ValueError, match=r"optim.name is 'muon', but no weight is a hidden matrix: \['dense', 'repl"):
        make_optimizer(OptimConfig(name="muon"), 10, NAMES)

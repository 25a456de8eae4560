"""Skipping of harmful updates: what is skipped, what stays, what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.reliability.anomaly import AnomalyConfig, fresh_guard, guard_specs, guarded
from cm3jax.state import fresh_state

SPIKES = AnomalyConfig(sigma=6.0, window=8)


def state(config, value=0.0):
    params = {"w": jnp.full(3, value)}
    return fresh_state(params, {"mu": params}, fresh_guard(config), {"ema": params})


def run(config, losses, norms=None):
    """One guarded update for each loss; update i would set every weight to i + 1."""
    step = jax.jit(lambda old, new, loss, norm: guarded(config, old, new, loss, norm))
    now, history = state(config), []
    for i, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        wanted = jax.tree.map(lambda x, i=i: jnp.full_like(x, i + 1), (now.params, now.opt_state, now.extra))
        new = now.replace(**dict(zip(("params", "opt_state", "extra"), wanted, strict=True)))
        now, metrics = step(now, new, jnp.float32(loss), jnp.float32(norm))
        history.append((float(now.params["w"][0]), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    return now, history


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_in_loss_and_in_norm(bad):
    now, history = run(AnomalyConfig(), [1.0, bad, 1.0, 1.0], [1.0, 1.0, bad, 1.0])
    assert history == [(1.0, 0, 0), (1.0, 1, 1), (1.0, 2, 2), (4.0, 2, 0)]
    assert int(now.step) == 4
    for tree in (now.opt_state, now.extra):
        assert {float(x[0]) for x in jax.tree.leaves(tree)} == {4.0}


def test_a_skipped_update_leaves_everything_but_the_counters():
    before, _ = run(SPIKES, [1.0] * 10)
    step = before.replace(params={"w": jnp.full(3, 9.0)}, opt_state={}, extra={})
    after, _ = guarded(SPIKES, before.replace(opt_state={}, extra={}), step, jnp.float32(jnp.nan), jnp.float32(1))
    assert jax.tree.all(jax.tree.map(np.array_equal, after.params, before.params))
    assert np.array_equal(after.guard["recent"], before.guard["recent"])
    assert int(after.step) == int(before.step) + 1


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_spike_is_skipped_once_the_window_is_full(which):
    calm = (1 + 0.05 * np.sin(np.arange(8))).tolist()
    values = [*calm, 5.0, 1.0]
    losses, norms = (values, [1.0] * 10) if which == "loss" else ([1.0] * 10, values)
    _, history = run(SPIKES, losses, norms)
    assert [skipped for _, skipped, _ in history] == [0] * 8 + [1, 1]
    assert [weight for weight, _, _ in history][-2:] == [8.0, 10.0]


def test_no_spike_is_called_before_the_window_is_full_nor_without_sigma():
    assert run(SPIKES, [1.0] * 7 + [50.0])[1][-1][1] == 0
    assert run(AnomalyConfig(), [1.0] * 20 + [50.0])[1][-1][1] == 0


def test_constant_values_do_not_make_every_change_a_spike():
    assert run(SPIKES, [1.0] * 12 + [1.05])[1][-1][1] == 0
    assert run(SPIKES, [1.0] * 12 + [1.07])[1][-1][1] == 1


def test_what_was_skipped_is_not_remembered():
    """After a spike the bound is still that of the calm updates, so a second spike is one too."""
    _, history = run(SPIKES, [1.0] * 8 + [5.0] * 20)
    assert history[-1] == (8.0, 20, 20)


def test_specs_have_the_structure_of_the_guard():
    assert fresh_guard(SPIKES).keys() == guard_specs().keys()


@pytest.mark.parametrize("values", [{"sigma": 0.0}, {"sigma": -1.0}, {"window": 1}])
def test_bad_configs_are_refused(values):
    with pytest.raises(ValueError, match="expected window >= 2 and sigma > 0"):
        AnomalyConfig(**values)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import shardings
from cm3jax.reliability.checkpoint import CheckpointConfig, CheckpointError, Checkpoints, load_params
from cm3jax.state import TrainState


def state(step: int) -> TrainState:
    params = {"w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + step, "b": {"c": jnp.ones(3) * step}}
    moments = jax.tree.map(lambda x: x * 2, params)
    return TrainState(jnp.asarray(step), params, (moments, jnp.asarray(step)), {"ema": params}, jnp.asarray(1))


def abstract(like: TrainState):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    with_three = Checkpoints(tmp_path / "c", CheckpointConfig(keep=3))
    for step in (1, 2, 3):
        with_three.save(step, state(step), {"data": "d", "seconds": step * 1.5})
    with_three.close()
    return tmp_path / "c"


def test_round_trip_with_note(saved):
    checkpoints = Checkpoints(saved, CheckpointConfig())
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.note(2) == {"data": "d", "seconds": 3.0}
    assert_same(checkpoints.restore(2, abstract(state(0))), state(2))
    step, newest = checkpoints.restore_newest(abstract(state(0)))
    assert step == 3
    assert_same(newest, state(3))


def test_old_checkpoints_are_removed_but_for_every_nth(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4))
    for step in range(1, 8):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 7]
    checkpoints.close()


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_falls_back_past_a_damaged_checkpoint(saved, damage, caplog):
    files = [p for p in (saved / "3").rglob("d/*") if p.is_file()]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "truncate":
            content = content[: len(content) // 2]
        elif damage == "empty":
            content = bytearray()
        else:
            content[len(content) // 2] ^= 0xFF
        file.write_bytes(bytes(content))
    step, restored = Checkpoints(saved, CheckpointConfig()).restore_newest(abstract(state(0)))
    assert step == 2
    assert_same(restored, state(2))
    assert "falling back" in caplog.text


def test_a_named_missing_step_is_an_error(saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*\[1, 2, 3\]"):
        Checkpoints(saved, CheckpointConfig()).restore(7, abstract(state(0)))


def test_restores_onto_another_mesh(saved):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    specs = jax.tree.map(lambda _: P(), state(0)).replace(params={"w": P("fsdp", "tensor"), "b": {"c": P()}})
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state(0), shardings(mesh, specs)
    )
    restored = Checkpoints(saved, CheckpointConfig()).restore(3, target)
    assert restored.params["w"].sharding.spec == P("fsdp", "tensor")
    assert_same(restored, state(3))


def test_load_params_and_ema(saved, tmp_path):
    step, params = load_params(saved)
    assert step == 3
    assert_same(params, state(3).params)
    assert_same(load_params(saved, "ema", 1)[1], state(1).params)
    with pytest.raises(CheckpointError, match="no checkpoint 9"):
        load_params(saved, step=9)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_params(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no extra state 'shadow'"):
        load_params(saved, "shadow")


def test_error_of_a_background_write_is_raised_at_the_next_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())

    class Failing:
        def result(self):
            raise OSError("disk full")

    checkpoints._pending = Failing()
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoints.save(1, state(1), {})

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
    note = checkpoints.note(2)
    assert len(note.pop("checksums")) == len(jax.tree.leaves(state(0)))
    assert note == {"data": "d", "seconds": 3.0}
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
    checkpoints = Checkpoints(saved, CheckpointConfig())
    step, restored = checkpoints.restore_newest(abstract(state(0)))
    assert step == 2
    assert_same(restored, state(2))
    assert "falling back" in caplog.text
    assert (saved / "3.damaged").is_dir() and checkpoints.steps() == [1, 2]
    checkpoints.save(3, state(3), {})
    checkpoints.close()
    assert_same(Checkpoints(saved, CheckpointConfig()).restore_newest(abstract(state(0)))[1], state(3))


def test_no_flipped_bit_goes_unnoticed(saved):
    """One bit of one file of the newest checkpoint, anywhere: it is passed over, or was of no consequence."""
    files = sorted(p for p in (saved / "3").rglob("*") if p.is_file() and p.stat().st_size)
    rng = np.random.default_rng(0)
    passed_over = 0
    for _ in range(40):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        checkpoints = Checkpoints(saved, CheckpointConfig())
        step, restored = checkpoints.restore_newest(abstract(state(0)))
        checkpoints.close()
        assert_same(restored, state(step))
        if step == 2:
            passed_over += 1
            (saved / "3.damaged").rename(saved / "3")
        file.write_bytes(whole)
    assert passed_over > 5


def test_other_numbers_than_those_saved_are_refused(saved, monkeypatch):
    """Storage that gives back wrong numbers without an error."""
    checkpoints = Checkpoints(saved, CheckpointConfig())
    load = checkpoints._manager.load_checkpointables

    def wrong(step, items):
        found = load(step, items)
        found["params"]["w"] = found["params"]["w"].at[3, 3].add(1e-6)
        return found

    monkeypatch.setattr(checkpoints._manager, "load_checkpointables", wrong)
    with pytest.raises(CheckpointError, match=r"checkpoint 2 .* is damaged: checksums differ .* of params/w$"):
        checkpoints.restore(2, abstract(state(0)))


def test_when_no_checkpoint_can_be_read_none_is_touched(saved):
    for file in (p for p in saved.rglob("d/*") if p.is_file()):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2, 3\] .* can be read"):
        Checkpoints(saved, CheckpointConfig()).restore_newest(abstract(state(0)))
    assert Checkpoints(saved, CheckpointConfig()).steps() == [1, 2, 3]


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 5]), ("max", [4, 5])])
def test_the_best_checkpoint_is_kept(tmp_path, mode, kept):
    config = CheckpointConfig(keep=1, best=1, best_metric="loss", best_mode=mode)
    checkpoints = Checkpoints(tmp_path, config)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, None], start=1):
        checkpoints.save(step, state(step), {}, None if loss is None else {"loss": loss, "other": 0.0})
    checkpoints.wait()
    assert checkpoints.steps() == kept
    with pytest.raises(CheckpointError, match="best_metric 'loss': evaluation has only other"):
        checkpoints.save(6, state(6), {}, {"other": 1.0})
    checkpoints.close()


@pytest.mark.parametrize("values", [{"every": 0}, {"keep": 0}, {"every_minutes": -1.0}, {"best": 1}])
def test_bad_configs_are_refused(values):
    with pytest.raises(ValueError, match="expected every >= 1|best_metric is not given"):
        CheckpointConfig(**values)


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


class Write:
    """A background write that goes on for `looks` looks at it and then fails."""

    def __init__(self, error, looks=0):
        self.error, self.looks = error, looks

    def result(self, timeout=None):
        self.looks -= 1
        raise TimeoutError if timeout is not None and self.looks >= 0 else self.error


@pytest.mark.parametrize("error", [OSError("disk full"), TimeoutError("disk full")])
def test_error_of_a_background_write_is_raised_at_the_next_save(tmp_path, error):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints._pending = Write(error)
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoints.save(1, state(1), {})


def test_error_of_a_background_write_is_raised_as_soon_as_it_is_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints._pending = Write(OSError("disk full"), looks=2)
    checkpoints.check()
    checkpoints.check()
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoints.check()
    checkpoints.check()

"""The attribute reader: model, task and marks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.data.scenes.space import ATTRIBUTES
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.data.sources.source import RejectError
from cm3jax.evals.attributes import chance, read, score, wilson
from cm3jax.models.reader import Reader, ReaderConfig, with_params
from cm3jax.optim import OptimConfig
from cm3jax.state import TrainState
from cm3jax.tasks import reader as readers
from cm3jax.tasks.reader import ReaderExamples, ReaderTask, ReaderTaskConfig, labels

SMALL = ReaderConfig(attributes=tuple(ATTRIBUTES.items()), image_size=32, channels=8, hidden=16)
TASK = ReaderTaskConfig(
    model=SMALL,
    source="scenes:split=train,count=16,size=32",
    valid="scenes:split=valid,count=8,size=32",
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=2, decay="constant"),
    batch_size=8,
)


def batch(task: ReaderTask, index: int) -> dict[str, np.ndarray]:
    rows = [task.examples[i] for i in range(index * task.batch_size, (index + 1) * task.batch_size)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def task() -> ReaderTask:
    return ReaderTask(TASK, seed=0, steps=40)


@pytest.fixture(scope="module")
def initial(task) -> TrainState:
    return jax.jit(task.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def reader(initial) -> Reader:
    return with_params(SMALL, initial.params)


def test_one_head_per_attribute(reader):
    logits = jax.eval_shape(reader, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    assert [scores.shape for scores in logits] == [(2, len(values)) for values in ATTRIBUTES.values()]


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="reader image_size: 44, expected a multiple of 8"):
        dataclasses.replace(SMALL, image_size=44)
    with pytest.raises(ValueError, match="reader channels: 5, expected an even number"):
        dataclasses.replace(SMALL, channels=5)
    with pytest.raises(ValueError, match="reader attributes"):
        dataclasses.replace(SMALL, attributes=(("color", ("red",)),))


def test_training_learns_the_training_pictures(task, initial):
    state, step, losses = initial, jax.jit(task.step), []
    for i in range(40):
        state, metrics = step(state, batch(task, i))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert int(state.step) == 40 and int(state.guard["skipped"]) == 0


def test_evaluation_agrees_with_reading_and_scoring(task, initial, reader, one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        numbers = task.evaluate(initial)
    source = ScenesSource("valid", 8, 32)
    told = read(reader, [document.segments[1].pixels for document in source], batch_size=3)
    marks = score(told, [document.meta["attributes"] for document in source])
    assert numbers["accuracy"] == pytest.approx(marks["mean"])
    for name in ATTRIBUTES:
        assert numbers[f"accuracy_{name}"] == pytest.approx(marks[name])


def test_specs_have_the_structure_of_the_state(task, initial):
    state, specs = initial, task.state_specs()
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    assert jax.tree.structure(state) == jax.tree.structure(specs, is_leaf=is_spec)


def test_examples_are_shuffled_anew_each_epoch_and_hold_every_document():
    examples = ReaderExamples(ScenesSource("train", 16, 32), SMALL, seed=3)
    epochs = [[examples[e * 16 + i]["image"].tobytes() for i in range(16)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    again = ReaderExamples(ScenesSource("train", 16, 32), SMALL, seed=3)
    assert again[21]["image"].tobytes() == epochs[1][5]
    assert again.fingerprint == examples.fingerprint
    assert ReaderExamples(ScenesSource("train", 16, 32), SMALL, seed=4).fingerprint != examples.fingerprint


def test_documents_without_truth_or_of_another_size_are_refused():
    with pytest.raises(RejectError, match="attribute color is None, expected one of"):
        labels(SMALL, {"subject": "dog"}, "some/id")
    with pytest.raises(RejectError, match=r"expected a picture of \(32, 32, 3\), found one of \(48, 48, 3\)"):
        ReaderExamples(ScenesSource("train", 1, 48), SMALL, seed=0)[0]


def test_degrading_blurs_edges_and_keeps_the_mean():
    checks = np.tile(np.array([[-1, 1], [1, -1]], np.float32), (8, 8))[None, :, :, None].repeat(3, -1).repeat(4, 0)
    degrade = jax.jit(readers.degrade)
    soft = degrade(checks, jax.random.key(0), blur=1.0, noise=0.0)
    assert np.all(np.abs(np.asarray(soft)).mean((1, 2, 3)) < 1.0)
    np.testing.assert_allclose(np.asarray(soft).mean(), 0.0, atol=1e-6)
    np.testing.assert_array_equal(degrade(checks, jax.random.key(0), blur=0.0, noise=0.0), checks)
    noisy = degrade(np.zeros((64, 32, 32, 3)), jax.random.key(1), blur=0.0, noise=0.3)
    # Standard deviation u * 0.3 with u uniform: root mean square 0.3 / sqrt(3).
    assert np.sqrt(np.mean(np.square(noisy))) == pytest.approx(0.3 / np.sqrt(3), rel=0.15)


def test_reading_fits_pictures_of_other_sizes(reader):
    small, large = ScenesSource("train", 3, 32), ScenesSource("train", 3, 64)
    told = read(reader, [large[i].segments[1].pixels for i in range(3)])
    assert [set(answer) for answer in told] == [set(ATTRIBUTES)] * 3
    assert read(reader, []) == []
    assert (
        read(reader, [small[0].segments[1].pixels]) == read(reader, [small[i].segments[1].pixels for i in range(3)])[:1]
    )


def test_scores_count_what_is_wanted():
    wanted = [{"color": "red", "place": "city"}, {"color": "blue"}]
    assert score([{"color": "red"}, {"color": "red"}], wanted) == {"color": 0.5, "place": 0.0, "mean": 0.25}
    with pytest.raises(ValueError, match="1 answers for 2 wanted"):
        score([{}], wanted)


def test_chance_is_one_in_the_number_of_values():
    assert chance([("color", ("red", "blue")), ("sky", ("noon", "night", "dawn", "storm"))]) == {
        "color": 0.5,
        "sky": 0.25,
        "mean": 0.375,
    }


def test_wilson_interval():
    # 10 of 20: Wilson (1927) gives 0.299 .. 0.701.
    assert wilson(10, 20) == pytest.approx((0.299, 0.701), abs=1e-3)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0, abs=1e-12)
    assert wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-3)
    for right, total in ((3, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="wilson"):
            wilson(right, total)

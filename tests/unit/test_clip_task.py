"""The dual encoder: losses, recall, pairs and the task."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.config import ConfigError
from cm3jax.data.pairs import PairExamples
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.data.sources.source import Reason, RejectError
from cm3jax.models.clip import normalised, with_params
from cm3jax.models.clip_config import CLIPConfig, TowerConfig
from cm3jax.models.contrastive import chance_recall, recall, sigmoid_loss, softmax_loss
from cm3jax.optim import OptimConfig
from cm3jax.tasks.clip import CLIPTask, CLIPTaskConfig
from cm3jax.tokens.text import train_text_tokenizer

MODEL = CLIPConfig(
    16, TowerConfig(32, 2, 2), TowerConfig(32, 2, 2), image_size=32, patch_size=8, vocab_size=320, context=24, end_id=2
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CLIPTaskConfig:
    path = tmp_path_factory.mktemp("clip") / "text.model"
    source = ScenesSource("train", 64, 32)
    train_text_tokenizer([source[i].segments[0].text for i in range(64)], 320, path)
    return CLIPTaskConfig(
        model=MODEL,
        tokenizer=str(path),
        source="scenes:split=train,count=16,size=32",
        valid="scenes:split=valid,count=12,size=32",
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=5, decay="constant"),
        batch_size=8,
    )


@pytest.fixture(scope="module")
def task(config) -> CLIPTask:
    return CLIPTask(config, seed=0, steps=40)


def batch(task, index):
    rows = [task.examples[i] for i in range(index * task.batch_size, (index + 1) * task.batch_size)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def features(seed, count=6):
    return np.asarray(normalised(jax.random.normal(jax.random.key(seed), (count, 8))))


def test_softmax_loss_is_the_mean_of_both_cross_entropies():
    images, texts = features(0), features(1)
    logits = 5 * images @ texts.T
    expected = 0
    for scores in (logits, logits.T):
        expected -= np.mean(np.diag(scores) - np.log(np.exp(scores).sum(axis=1))) / 2
    assert float(softmax_loss(images, texts, jnp.asarray(5.0))) == pytest.approx(expected, rel=1e-5)


def test_sigmoid_loss_tells_every_pair():
    images, texts = features(0), features(1)
    expected = 0
    for i in range(6):
        for j in range(6):
            logit = 5 * images[i] @ texts[j] - 2
            expected += np.log1p(np.exp(-logit if i == j else logit)) / 6
    assert float(sigmoid_loss(images, texts, jnp.asarray(5.0), jnp.asarray(-2.0))) == pytest.approx(expected, rel=1e-5)


def test_recall_counts_any_right_target_and_chance_is_what_a_random_order_gives():
    targets = np.eye(8, dtype=np.float32)
    queries = targets[:2] + 0.5 * targets[2:4]
    right = np.zeros((2, 8), np.float32)
    right[0, [0, 5]] = right[1, 3] = 1
    assert recall(queries, targets, right, 1) == 0.5
    assert recall(queries, targets, right, 2) == 1.0
    orders = np.argsort(np.random.default_rng(0).random((20_000, 8)), axis=1)[:, :3]
    random_recall = np.mean([right[i][orders].any(axis=1).mean() for i in range(2)])
    assert chance_recall(right, 3) == pytest.approx(random_recall, abs=0.01)
    assert chance_recall(right, 8) == 1.0


def test_what_stands_behind_the_end_has_no_effect(task):
    model = with_params(MODEL, jax.jit(task.init)(jax.random.key(0)).params)
    rows = np.full((2, MODEL.context), 7, np.int32)
    rows[:, 5] = MODEL.end_id
    rows[1, 6:] = 9
    first, second = np.asarray(model.encode_texts(rows))
    np.testing.assert_array_equal(first, second)
    rows[1, 4] = 9
    assert not np.allclose(*np.asarray(model.encode_texts(rows)))


@pytest.mark.parametrize("bias", [False, True])
def test_training_tells_the_training_pairs_apart(config, bias):
    task = CLIPTask(dataclasses.replace(config, model=dataclasses.replace(MODEL, bias=bias)), seed=0, steps=40)
    state, step, losses = jax.jit(task.init)(jax.random.key(0)), jax.jit(task.step), []
    for i in range(40):
        state, metrics = step(state, batch(task, i))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:2])
    assert int(state.guard["skipped"]) == 0


def test_evaluation_ranks_different_pictures_and_captions(task, one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        numbers = task.evaluate(jax.jit(task.init)(jax.random.key(0)))
    assert set(numbers) == {
        f"{way}_{what}_{k}"
        for way in ("text_to_image", "image_to_text")
        for what in ("recall", "chance")
        for k in (1, 5, 10)
    }
    assert all(0 <= value <= 1 for value in numbers.values())
    assert numbers["image_to_text_chance_10"] >= 10 / 12 - 1e-9


def test_a_document_that_is_no_pair_gives_its_place_to_the_next(task):
    class Broken(ScenesSource):
        def __init__(self, *arguments, refused):
            super().__init__(*arguments)
            self.refused = refused

        def __getitem__(self, index):
            if index in self.refused:
                raise RejectError(Reason.NO_CAPTION, "no caption")
            return super().__getitem__(index)

    whole = PairExamples(ScenesSource("train", 12, 32), task._tokenizer, 32, seed=3)
    pairs = PairExamples(Broken("train", 12, 32, refused=(5, 6, 11)), task._tokenizer, 32, seed=3)
    stands_in = {5: 7, 6: 7, 11: 0}
    for index, document in enumerate(whole._permutation(0)):
        expected = whole.document(stands_in.get(int(document), int(document)))
        jax.tree.map(np.testing.assert_array_equal, pairs[index], expected)
    with pytest.raises(RejectError, match="none of 6 documents of scenes is a pair"):
        PairExamples(Broken("train", 6, 32, refused=range(6)), task._tokenizer, 32, seed=3)[0]


def test_specs_have_the_structure_of_the_state(task):
    state, specs = jax.eval_shape(task.init, jax.random.key(0)), task.state_specs()
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    assert jax.tree.structure(state) == jax.tree.structure(specs, is_leaf=is_spec)


def test_a_tokenizer_that_does_not_fit_is_refused(config):
    model = dataclasses.replace(MODEL, end_id=3)
    with pytest.raises(ConfigError, match="has 320 ids and the end 2, clip.model has vocab_size 320 and end_id 3"):
        CLIPTask(dataclasses.replace(config, model=model), seed=0, steps=1).examples  # noqa: B018


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="image_size 32 is not a multiple of patch_size 5"):
        dataclasses.replace(MODEL, patch_size=5)
    with pytest.raises(ValueError, match="clip tower"):
        TowerConfig(32, 2, 3)

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cm3jax import loop
from cm3jax.config import ConfigError
from cm3jax.data.cm3 import invert
from cm3jax.data.loader import batches
from cm3jax.data.plan import PlanConfig
from cm3jax.data.records import Records
from cm3jax.loop import RunConfig
from cm3jax.metrics import read_metrics
from cm3jax.models.config import cm3leon
from cm3jax.optim import OptimConfig
from cm3jax.optim.blocks import Blocks
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.tasks.lm import DatasetConfig, LMConfig, LMTask
from cm3jax.tasks.update import abstract_state
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=320, image_size=8, sentinels=8, size=352)


def config(scene_records, **changes):
    model = dataclasses.replace(cm3leon(32, 2, 2, VOCABULARY.size, 64), init_std=0.05, position_std=0.05)
    values = {
        "model": model,
        "train": (DatasetConfig(str(scene_records / "train")),),
        "valid": (DatasetConfig(str(scene_records / "valid")),),
        "vocabulary": VOCABULARY,
        "image_tokenizer": "none",
        "text_tokenizer": "none",
        "plan": PlanConfig(64),
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=2),
        "batch_size": 8,
        "loss_chunk": 64,
    }
    return LMConfig(**values | changes)


def losses(scene_records, tmp_path, mesh, steps=6, **changes):
    task = LMTask(config(scene_records, **changes), seed=1, steps=steps)
    loop.run(task, RunConfig(steps=steps, log_every=1, mesh=mesh), tmp_path, seed=1, fingerprint="f")
    return read_metrics(tmp_path / "metrics.jsonl")


def test_learns_and_reports_each_modality(scene_records, tmp_path):
    metrics = losses(scene_records, tmp_path, MeshConfig(), steps=30)
    loss = metrics["loss"][1]
    assert loss[-1] < 0.75 * loss[0]
    assert {"text_loss", "image_loss", "tokens_per_second", "mfu"} <= set(metrics)
    text, image = (metrics[f"eval/bits_per_{kind}_token"][1][0] for kind in ("text", "image"))
    assert 0 < image < np.log2(VOCABULARY.image_size) < text < np.log2(VOCABULARY.size)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_mesh_does_not_change_the_losses(scene_records, tmp_path, mesh):
    one = losses(scene_records, tmp_path / "one", MeshConfig(data=1, fsdp=1, replica=-1))
    other = losses(scene_records, tmp_path / "other", mesh)
    np.testing.assert_allclose(other["loss"][1], one["loss"][1], rtol=1e-5)


def test_muon_with_byte_moments_is_sharded_and_survives_a_resume(scene_records, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    optim = OptimConfig(name="muon", moments="int8", learning_rate=1e-2, warmup_steps=2, decay="constant")
    whole = losses(scene_records, tmp_path / "whole", mesh, steps=4, optim=optim)
    losses(scene_records, tmp_path / "parts", mesh, steps=2, optim=optim)
    resumed = losses(scene_records, tmp_path / "parts", mesh, steps=4, optim=optim)
    np.testing.assert_array_equal(resumed["loss"][1], whole["loss"][1])
    task = LMTask(config(scene_records, optim=optim), seed=1, steps=4)
    state = abstract_state(task, make_mesh(mesh))
    blocks = [node for node in jax.tree.leaves(state.opt_state, is_leaf=is_blocks) if is_blocks(node)]
    assert {block.codes.sharding.spec for block in blocks} >= {P(None, "fsdp", "tensor"), P("tensor", "fsdp")}
    assert all(block.scales.sharding.spec == block.codes.sharding.spec for block in blocks)


def is_blocks(node):
    return isinstance(node, Blocks)


def test_microbatches_give_the_update_of_the_whole_batch(scene_records, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    whole = losses(scene_records, tmp_path / "whole", mesh)
    parts = losses(scene_records, tmp_path / "parts", mesh, accumulate=2)
    np.testing.assert_allclose(parts["loss"][1], whole["loss"][1], rtol=1e-5)
    np.testing.assert_allclose(parts["grad_norm"][1], whole["grad_norm"][1], rtol=1e-4)


def test_isolated_samples_are_learnt_as_if_alone(scene_records):
    task = LMTask(config(scene_records, isolate_samples=True), seed=1, steps=1)
    rng, eos = np.random.default_rng(0), VOCABULARY.eos
    samples = [[eos, *rng.integers(4, 320, n).tolist(), eos] for n in (9, 17, 5)]
    rows = [sum(samples, []), *samples]
    tokens = np.full((4, 65), VOCABULARY.pad, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    weights = (tokens != VOCABULARY.pad).astype(np.float32)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), jax.jit(task.init)(jax.random.key(0)).params)

    def gradients(rows):
        batch = {"tokens": tokens[rows], "weights": weights[rows]}
        (loss, sums), grads = jax.jit(jax.value_and_grad(task._losses, has_aux=True))(params, batch)
        return loss, sums["loss"][1], grads

    packed, alone = gradients(slice(0, 1)), gradients(slice(1, 4))
    assert float(packed[1]) == sum(map(len, samples)) - 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), packed, alone)


def test_batch_i_directly_equals_batch_i_reached_by_iterating(scene_records):
    task = LMTask(config(scene_records), seed=1, steps=30)
    iterated = list(batches(task.examples, 8, 0, 25))
    for i in (0, 1, 7, 24):
        direct = next(batches(task.examples, 8, i, 1))
        jax.tree.map(np.testing.assert_array_equal, direct, iterated[i])


def test_batches_hold_the_documents(scene_records):
    """Undoing the objective on a whole epoch gives every record, framed, once."""
    task = LMTask(config(scene_records), seed=1, steps=30)
    plan = task.examples.plans.epoch(0)
    stream = np.concatenate([invert(task.examples[i]["tokens"], VOCABULARY) for i in range(len(plan))])
    ends = np.flatnonzero(stream == VOCABULARY.eos)
    documents = [tuple(stream[a + 1 : b]) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    found = Records(scene_records / "train")
    assert sorted(documents) == sorted(tuple(found[i].ids) for i in range(len(found)))


def test_another_vocabulary_is_refused(scene_records):
    model = dataclasses.replace(config(scene_records).model, vocab_size=384)
    vocabulary = dataclasses.replace(VOCABULARY, size=384)
    task = LMTask(config(scene_records, model=model, vocabulary=vocabulary), seed=0, steps=1)
    with pytest.raises(ConfigError, match=r"lm.vocabulary is .*size=384.*train Vocabulary.*size=352"):
        task.data_fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "batch_size 8 is not divisible by accumulate 3"),
        ({"plan": PlanConfig(128)}, "more than model"),
        ({"vocabulary": Vocabulary()}, "vocab_size 352 is not vocabulary.size 65536"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(scene_records, changes, message):
    with pytest.raises(ValueError, match=message):
        config(scene_records, **changes)


def test_data_fingerprint_follows_the_data_and_the_batch(scene_records):
    prints = [
        LMTask(config(scene_records, **changes), seed=seed, steps=1).data_fingerprint()
        for seed, changes in [(0, {}), (1, {}), (0, {"batch_size": 16}), (0, {"plan": PlanConfig(48)})]
    ]
    assert len(set(prints)) == 4
    assert prints[0] == LMTask(config(scene_records), seed=0, steps=1).data_fingerprint()

"""The tokens of query documents: which they are, and what evaluation says of them alone."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from cm3jax.data.cm3 import CM3Config
from cm3jax.data.framing import CLOSES, OPENS, PIECE, query_tokens
from cm3jax.data.mixture import Mixture
from cm3jax.data.plan import PlanConfig
from cm3jax.data.plans import Plans
from cm3jax.data.records import Records
from cm3jax.data.sequences import CausalSequences
from cm3jax.models.config import cm3leon
from cm3jax.tasks.lm import DatasetConfig, LMConfig, LMTask


class TwoBefore:
    """Retrieves the two records before the query, as far as there are."""

    fingerprint = "two before"

    def __call__(self, queries, rng):
        return np.maximum(queries[:, None] - [2, 1], -1)


class OwnIds:
    """Record i holds the id 10 + i, two times or more."""

    fingerprint = "own ids"

    def __init__(self, vocabulary, count=20):
        self.vocabulary = vocabulary
        self.lengths = np.random.default_rng(0).integers(2, 9, count).astype(np.int32)

    def __getitem__(self, record):
        return types.SimpleNamespace(ids=np.full(self.lengths[record], 10 + record, self.vocabulary.dtype))


def marked(*pieces):
    return query_tokens(np.array(list(pieces), PIECE)).astype(int).tolist()


def test_a_query_is_the_last_document_of_a_sample_without_the_mark_in_front():
    assert marked((7, 0, 4, OPENS), (8, 0, 3, 0), (9, 0, 4, CLOSES)) == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert marked((9, 0, 4, OPENS | CLOSES), (3, 0, 2, OPENS)) == [0, 1, 1, 1, 0, 0]
    assert marked((9, 2, 2, CLOSES), (9, 0, 1, OPENS | CLOSES)) == [1, 1, 0], "pieces of documents that were cut"
    assert marked() == []


@pytest.mark.parametrize("packing", ["cut", "whole"])
@pytest.mark.parametrize("neighbours", [None, TwoBefore()])
def test_every_query_is_marked_once_in_an_epoch(tiny_vocabulary, packing, neighbours):
    records = OwnIds(tiny_vocabulary)
    plans = Plans(Mixture([(records, 1.0)]), PlanConfig(32, packing, spans="causal"), 0, neighbours=neighbours)
    sequences = CausalSequences(plans, CM3Config())
    found = np.zeros(0, int)
    for i in range(len(plans.epoch(0))):
        example = sequences[i]
        assert example["query"].shape == example["tokens"].shape
        assert np.all(example["query"] <= example["weights"])
        found = np.append(found, example["tokens"][example["query"] == 1])
    expected = np.repeat(10 + np.arange(20), records.lengths)
    assert sorted(found) == sorted([*expected, *[tiny_vocabulary.eos] * 20])


def test_tokens_that_the_objective_moves_are_refused(tiny_vocabulary):
    plans = Plans(Mixture([(OwnIds(tiny_vocabulary), 1.0)]), PlanConfig(32), 0)
    with pytest.raises(ValueError, match="spans 'paper'"):
        CausalSequences(plans, CM3Config())


@pytest.fixture
def task(scene_records):
    manifest = Records(scene_records / "train").manifest
    model = dataclasses.replace(cm3leon(32, 1, 2, manifest.vocabulary.size, 240), init_std=0.05)
    data = {split: (DatasetConfig(str(scene_records / split)),) for split in ("train", "valid")}
    settings = {"vocabulary": manifest.vocabulary, "image_tokenizer": "none", "text_tokenizer": "none"}
    plan = PlanConfig(240, packing="whole")
    return LMTask(LMConfig(model=model, plan=plan, batch_size=1, **data, **settings), seed=0, steps=1)


def test_evaluation_tells_the_bits_of_the_queries_alone(task, one_device_mesh, monkeypatch):
    monkeypatch.setattr(task, "_neighbours", lambda *_: TwoBefore())
    with jax.set_mesh(one_device_mesh):
        state = jax.jit(task.init)(jax.random.key(0))
        found = task.evaluate(state)
        nll, tokens = 0.0, 0.0
        for i in range(len(task._validation.plans.epoch(0))):
            example = task._validation[i]
            alone = {name: row[None] for name, row in example.items() if name != "query"}
            alone["weights"] = (example["weights"] * example["query"])[None]
            total, weight = jax.device_get(task._losses(state.params, alone)[1]["loss"])
            nll, tokens = nll + total, tokens + weight
    lengths = Records(task.config.valid[0].path).lengths
    assert tokens == lengths.sum() + 12
    np.testing.assert_allclose(found["bits_per_query_token"], nll / tokens / np.log(2), rtol=1e-5)
    assert found["bits_per_query_token"] != found["bits_per_token"]


def test_without_retrieval_every_document_is_a_query(task, one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        found = task.evaluate(jax.jit(task.init)(jax.random.key(0)))
    for kind in ("text", "image"):
        assert found[f"bits_per_query_{kind}_token"] == found[f"bits_per_{kind}_token"]

"""Sequences and batches: pure functions of their index, for any number of processes, threads and workers."""

import dataclasses
import itertools
import types

import cloudpickle
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.data.cm3 import CM3Config, invert
from cm3jax.data.loader import LoaderConfig, batches, prefetch_to_device, process_slot
from cm3jax.data.mixture import Mixture
from cm3jax.data.plan import PlanConfig
from cm3jax.data.plans import Plans
from cm3jax.data.sequences import Sequences
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding
from cm3jax.tokens.vocabulary import Vocabulary

LENGTH = 48


@dataclasses.dataclass
class Captions:
    """Records made up on the spot: a caption, a break, an image, all of them different."""

    lengths: np.ndarray
    vocabulary: Vocabulary
    fingerprint: str = "captions"

    def __getitem__(self, i):
        rng, size = np.random.default_rng(i), self.lengths[i] - 4
        image = self.vocabulary.image_id(rng.integers(0, self.vocabulary.image_size, size))
        ids = np.concatenate([rng.integers(4, 64, 3), [self.vocabulary.break_id], image])
        return types.SimpleNamespace(ids=ids.astype(self.vocabulary.dtype))


def make_sequences(vocabulary, packing="cut", seed=0, **cm3):
    lengths = np.random.default_rng(9).integers(6, 40, 30)
    mixture = Mixture([(Captions(lengths[:20], vocabulary), 1.0), (Captions(lengths[20:], vocabulary), 1.0)])
    return Sequences(Plans(mixture, PlanConfig(LENGTH, packing), seed), CM3Config(**cm3))


@pytest.fixture
def sequences(tiny_vocabulary) -> Sequences:
    return make_sequences(tiny_vocabulary)


def take(iterator, count):
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert np.array_equal(a[name], b[name])


@pytest.mark.parametrize("packing", ["cut", "whole"])
def test_an_epoch_of_sequences_undone_is_every_record_once(tiny_vocabulary, packing):
    sequences = make_sequences(tiny_vocabulary, packing)
    mixture, eos = sequences.mixture, tiny_vocabulary.eos
    for epoch in (0, 1):
        first = sum(len(sequences.plans.epoch(e)) for e in range(epoch))
        indices = range(first, first + len(sequences.plans.epoch(epoch)))
        tokens = [sequences[i]["tokens"] for i in indices]
        assert all(t.shape == (LENGTH + 1,) for t in tokens)
        stream = np.concatenate([invert(t, tiny_vocabulary) for t in tokens])
        assert stream[0] == stream[-1] == eos
        got = sorted(map(tuple, np.split(stream, np.flatnonzero(stream == eos)[1::2] + 1)))[1:]
        assert got == sorted((eos, *mixture[i].ids.tolist(), eos) for i in range(len(mixture)))


def test_a_sequence_holds_what_its_plan_lists(sequences, tiny_vocabulary):
    for index in (0, 3, 40, 7):
        epoch, i = sequences.plans.locate(index)
        plan = sequences.plans.epoch(epoch)
        example = sequences[index]
        assert np.array_equal(invert(example["tokens"], tiny_vocabulary), sequences.fetch(plan.pieces_of(i)))
        assert np.sum(example["tokens"] == tiny_vocabulary.eoss) == plan.spans[i]


def test_sequences_depend_on_seed_index_and_nothing_else(tiny_vocabulary):
    one, two, other = (make_sequences(tiny_vocabulary, seed=seed) for seed in (0, 0, 1))
    forward = [one[i] for i in range(30)]
    backward = [two[i] for i in reversed(range(30))][::-1]
    assert_same(forward, backward)
    assert len({example["tokens"].tobytes() for example in forward}) == 30
    assert not np.array_equal(other[0]["tokens"], forward[0]["tokens"])


def test_the_same_sequence_of_two_epochs_differs(sequences):
    size = len(sequences.plans.epoch(0))
    assert not np.array_equal(sequences[0]["tokens"], sequences[size]["tokens"])


class Copies(Captions):
    """Every record the same, so that sequences differ by their spans alone."""

    def __getitem__(self, i):
        return super().__getitem__(0)


def test_spans_are_drawn_anew_for_each_sequence_and_epoch(tiny_vocabulary):
    mixture = Mixture([(Copies(np.full(20, 44), tiny_vocabulary), 1.0)])  # one framed record fills a sequence
    sequences = Sequences(Plans(mixture, PlanConfig(LENGTH, "whole", "fim"), 0), CM3Config(whole_segment=0.0))
    epochs = [[sequences[i]["tokens"].tobytes() for i in range(e * 20, e * 20 + 20)] for e in (0, 1)]
    assert len(set(epochs[0])) > 10
    assert sum(a == b for a, b in zip(*epochs, strict=True)) < 5


def test_a_record_that_changed_since_the_plan_is_an_error(sequences):
    plan = sequences.plans.epoch(0)
    record = int(plan.pieces_of(0)["record"][0])
    sequences.mixture.lengths[record] -= 1
    with pytest.raises(ValueError, match=f"record {record} has"):
        sequences[0]


def test_fingerprint_of_sequences_follows_plan_and_objective(tiny_vocabulary):
    variants = [{}, {"seed": 1}, {"packing": "whole"}, {"whole_segment": 0.1}, {"loss_on_sentinels": False}]
    assert len({make_sequences(tiny_vocabulary, **v).fingerprint for v in variants}) == len(variants)


@pytest.mark.parametrize("config", [LoaderConfig(threads=0), LoaderConfig(threads=3, ahead=2)])
def test_starting_at_a_batch_equals_iterating_to_it(sequences, config):
    expected = [
        {name: np.stack([sequences[i][name] for i in range(4 * b, 4 * b + 4)]) for name in ("tokens", "weights")}
        for b in range(9)
    ]
    assert_same(take(batches(sequences, 4, config=config), 9), expected)
    assert_same(take(batches(sequences, 4, start=6, config=config), 3), expected[6:])
    assert_same(list(batches(sequences, 4, start=2, steps=3, config=config)), expected[2:5])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_together_have_the_same_global_batches(sequences, count):
    parts = [list(batches(sequences, 4, 3, 5, process_index=p, process_count=count)) for p in range(count)]
    together = [
        {name: np.concatenate([b[name] for b in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(together, list(batches(sequences, 4, 3, 5)))


def test_workers_give_the_same_batches(sequences):
    cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])  # workers cannot import a test
    got = take(batches(sequences, 2, start=1, config=LoaderConfig(workers=2, threads=1, ahead=1)), 4)
    assert_same(got, list(batches(sequences, 2, start=1, steps=4)))


def test_an_error_in_an_example_reaches_the_reader(sequences):
    sequences.mixture.lengths[:] -= 1
    with pytest.raises(ValueError, match="planned were"):
        next(batches(sequences, 2))


@pytest.mark.parametrize(("size", "index", "count"), [(4, 0, 3), (4, 2, 2), (4, -1, 2)])
def test_batches_that_processes_cannot_share_are_refused(sequences, size, index, count):
    with pytest.raises(ValueError, match=f"batch of {size}"):
        batches(sequences, size, process_index=index, process_count=count)


def test_bad_loader_config_is_refused():
    with pytest.raises(ValueError, match="ahead >= 1"):
        LoaderConfig(ahead=0)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_keeps_order_and_shards_over_the_devices(sequences, depth):
    sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    host = list(batches(sequences, 8, steps=4))
    device = list(prefetch_to_device(iter(host), sharding, depth))
    assert all(batch["tokens"].sharding == sharding for batch in device)
    assert_same([jax.device_get(batch) for batch in device], host)


def test_prefetch_reads_no_further_ahead_than_asked_and_closes_what_it_reads():
    read, closed = [], []

    def source():
        try:
            for i in range(100):
                read.append(i)
                yield {"x": np.full(8, i)}
        finally:
            closed.append(True)

    stream = prefetch_to_device(source(), jax.sharding.SingleDeviceSharding(jax.devices()[0]), depth=3)
    assert [int(next(stream)["x"][0]) for _ in range(4)] == [0, 1, 2, 3]
    assert read == list(range(6))
    stream.close()
    assert closed


class Addressable:
    """As a sharding looks to a process that owns these rows."""

    def __init__(self, *rows):
        self.rows = rows

    def addressable_devices_indices_map(self, shape):
        return {i: (rows,) for i, rows in enumerate(self.rows)}


def test_process_slot_of_one_process_is_everything():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    assert process_slot(batch_sharding(mesh), 8) == (0, 1)
    assert process_slot(NamedSharding(mesh, P()), 8) == (0, 1)


def test_process_slot_follows_the_rows_that_the_devices_hold():
    assert process_slot(Addressable(slice(4, 6), slice(6, 8)), 16) == (1, 4)
    assert process_slot(Addressable(slice(8, 16), slice(8, 16)), 16) == (1, 2)  # two devices that share a model
    for rows in ([slice(0, 2), slice(4, 6)], [slice(0, 6)], [slice(2, 6)]):
        with pytest.raises(ValueError, match="one contiguous equal share"):
            process_slot(Addressable(*rows), 16)

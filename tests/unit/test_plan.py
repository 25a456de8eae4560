"""Samples, plans of epochs, and plans on disk."""

import dataclasses
import logging
import math
import pickle

import numpy as np
import pytest

from cm3jax import config
from cm3jax.data.framing import framed_ids
from cm3jax.data.mixture import Mixture
from cm3jax.data.plan import PlanConfig, plan_epoch, span_counts
from cm3jax.data.plan_file import PlanFileError, read_plan, write_plan
from cm3jax.data.plans import Plans
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.samples import epoch_samples
from cm3jax.tokens.vocabulary import Vocabulary


@dataclasses.dataclass
class Lengths:
    """A record set of which only the lengths are ever asked."""

    lengths: np.ndarray
    vocabulary: Vocabulary
    fingerprint: str = "lengths"


class TwoBefore:
    """Retrieves the two records before the query, as far as there are."""

    fingerprint = "two before"

    def __call__(self, queries, rng):
        return np.maximum(queries[:, None] - [2, 1], -1)


@pytest.fixture
def mixture(tiny_vocabulary) -> Mixture:
    lengths = np.random.default_rng(0).integers(0, 40, 60).astype(np.int32)
    return Mixture([(Lengths(lengths[:40], tiny_vocabulary), 1.0), (Lengths(lengths[40:], tiny_vocabulary), 2.25)])


def test_random_streams_of_nearby_positions_differ():
    draws = {tuple(generator(Purpose.SPANS, *p).integers(1 << 60, size=2)) for p in [(1,), (1, 0), (1, 0, 0), (0, 1)]}
    assert len(draws) == 4


def test_repeats_are_exact_and_their_random_part_changes_with_the_epoch():
    epochs = [epoch_samples([40, 20, 9], [1.0, 2.25, 0.0], 7, epoch).records for epoch in (0, 1)]
    extras = []
    for records in epochs:
        counts = np.bincount(records, minlength=69)
        assert np.all(counts[:40] == 1)
        assert sorted(counts[40:60]) == [2] * 15 + [3] * 5
        assert np.all(counts[60:] == 0)
        extras.append(np.flatnonzero(counts == 3).tolist())
    assert extras[0] != extras[1]
    assert not np.array_equal(*epochs)
    assert np.array_equal(epochs[1], epoch_samples([40, 20, 9], [1.0, 2.25, 0.0], 7, 1).records)
    assert not np.array_equal(epochs[1], epoch_samples([40, 20, 9], [1.0, 2.25, 0.0], 8, 1).records)


def test_samples_are_shuffled_over_all_data_sets():
    orders = [epoch_samples([500, 500], [1.0, 1.0], 0, epoch).records for epoch in (0, 1)]
    for records in orders:
        assert np.array_equal(np.sort(records), np.arange(1000))
        assert abs(np.corrcoef(records, np.arange(1000))[0, 1]) < 0.15  # 4.7 standard deviations
    assert not np.array_equal(*orders)


def test_neighbours_stand_before_their_query():
    samples = epoch_samples([10], [1.0], 0, 0, TwoBefore())
    rows = [samples.records[a:b].tolist() for a, b in zip(samples.offsets[:-1], samples.offsets[1:], strict=True)]
    assert sorted(rows, key=lambda row: row[-1]) == [[0], [0, 1], *([i - 2, i - 1, i] for i in range(2, 10))]


@pytest.mark.parametrize("neighbours", [None, TwoBefore()])
def test_cut_plan_of_an_epoch_holds_every_token_of_every_sample_once(mixture, tiny_vocabulary, neighbours):
    contents = [record % 60 + 4 + np.arange(n) % 2 for record, n in enumerate(mixture.lengths)]
    samples = epoch_samples(mixture.sizes, mixture.repeats, 3, 1, neighbours)
    plan = plan_epoch(samples, mixture.lengths, PlanConfig(40), 8, 3, 1)
    got = [framed_ids(contents[r], f, tiny_vocabulary)[a : a + n] for r, a, n, f in plan.pieces.tolist()]
    expected = []
    for start, end in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        marks = [tiny_vocabulary.eos] + [tiny_vocabulary.break_id] * (end - start - 1)
        for mark, record in zip(marks, samples.records[start:end], strict=True):
            expected += [[mark], contents[record]]
        expected.append([tiny_vocabulary.eos])
    assert np.array_equal(np.concatenate(got), np.concatenate(expected))


@pytest.mark.parametrize("packing", ["cut", "whole"])
def test_plan_is_a_pure_function_of_seed_and_epoch(mixture, packing):
    def plan(seed, epoch):
        samples = epoch_samples(mixture.sizes, mixture.repeats, seed, epoch)
        made = plan_epoch(samples, mixture.lengths, PlanConfig(60, packing), 8, seed, epoch)
        return made.pieces.tobytes() + made.offsets.tobytes() + made.spans.tobytes()

    assert plan(1, 2) == plan(1, 2)
    assert len({plan(1, 2), plan(1, 3), plan(2, 2)}) == 3


def test_span_counts_follow_the_poisson_distribution():
    count = 10_000
    observed = np.bincount(span_counts(count, PlanConfig(4096), 4, np.random.default_rng(0)), minlength=5)
    expected = [math.exp(-1) / math.factorial(k) for k in range(4)]
    expected = count * np.array([*expected, 1 - sum(expected)])  # the last holds everything from 4 on
    assert len(observed) == 5
    assert np.sum((observed - expected) ** 2 / expected) < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_span_modes_and_the_most_that_fits(mixture):
    samples = epoch_samples(mixture.sizes, mixture.repeats, 0, 0)

    def spans(sentinels=8, **changes):
        return plan_epoch(samples, mixture.lengths, PlanConfig(40, **changes), sentinels, 0, 0).spans

    assert set(spans(spans="fim")) == {1}
    assert set(spans(spans="causal")) == {0}
    assert set(spans(span_rate=100.0)) == {3}  # 41 tokens, a quarter of them for marks
    assert set(spans(span_rate=100.0, sentinels=2)) == {2}


def test_whole_plan_says_loudly_what_it_leaves_out(mixture, caplog):
    samples = epoch_samples(mixture.sizes, mixture.repeats, 0, 0)
    with caplog.at_level(logging.WARNING):
        plan = plan_epoch(samples, mixture.lengths, PlanConfig(30, packing="whole"), 8, 0, 0)
    left_out = int(np.sum(mixture.lengths[samples.records] + 2 > 31))
    assert plan.skipped == left_out > 0
    assert f"leaves out {left_out} of {len(samples)} documents" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 11}, "length 11"),
        ({"length": 64, "span_rate": 0.0}, "span_rate 0.0"),
        ({"length": 64, "spans": "poisson"}, "'poisson' is not one of"),
    ],
)
def test_bad_plan_configs_are_refused(values, message):
    with pytest.raises(config.ConfigError, match=message):
        config.build(PlanConfig, values)


def test_plans_number_sequences_through_the_epochs(mixture):
    plans = Plans(mixture, PlanConfig(40), seed=5)
    sizes = [len(plans.epoch(e)) for e in range(4)]
    assert len(set(sizes)) > 1  # or this test could not see an epoch's own length being ignored
    expected = [(e, i) for e, size in enumerate(sizes) for i in range(size)]
    assert [plans.locate(i) for i in range(sum(sizes))] == expected
    last = sum(sizes) - 1
    assert (
        pickle.loads(pickle.dumps(plans)).locate(last) == Plans(mixture, PlanConfig(40), 5).locate(last) == expected[-1]
    )
    with pytest.raises(IndexError, match="-1"):
        plans.locate(-1)


def test_plans_of_an_epoch_in_which_nothing_fits_are_an_error(tiny_vocabulary):
    mixture = Mixture([(Lengths(np.array([50, 60]), tiny_vocabulary), 1.0)])
    with pytest.raises(ValueError, match="epoch 0 is empty: no sample fits in 21 tokens"):
        Plans(mixture, PlanConfig(20, packing="whole"), 0).locate(0)


def test_fingerprint_of_plans_follows_everything_that_changes_them(mixture, tiny_vocabulary):
    other = Mixture([(Lengths(mixture.lengths, tiny_vocabulary, "others"), 1.0)])
    heavier = Mixture([(Lengths(mixture.lengths, tiny_vocabulary, "others"), 2.0)])
    variants = [
        Plans(mixture, PlanConfig(40), 0),
        Plans(mixture, PlanConfig(41), 0),
        Plans(mixture, PlanConfig(40), 1),
        Plans(mixture, PlanConfig(40), 0, neighbours=TwoBefore()),
        Plans(other, PlanConfig(40), 0),
        Plans(heavier, PlanConfig(40), 0),
    ]
    assert len({plans.fingerprint for plans in variants}) == len(variants)


@pytest.mark.parametrize(("repeats", "message"), [((1.0, -1.0), "repeats"), ((0.0, 0.0), "some samples")])
def test_mixtures_without_samples_are_refused(tiny_vocabulary, repeats, message):
    records = Lengths(np.array([3]), tiny_vocabulary)
    with pytest.raises(ValueError, match=message):
        Mixture([(records, repeat) for repeat in repeats])


def test_mixtures_of_two_vocabularies_are_refused(tiny_vocabulary):
    other = dataclasses.replace(tiny_vocabulary, sentinels=7)
    with pytest.raises(ValueError, match="part 1"):
        Mixture([(Lengths(np.array([3]), v), 1.0) for v in (tiny_vocabulary, other)])


def test_plans_in_files_equal_plans_in_memory_and_are_read_again(mixture, tmp_path):
    plans, again = (Plans(mixture, PlanConfig(40), 5, tmp_path) for _ in range(2))
    memory = Plans(mixture, PlanConfig(40), 5)
    mapped = plans.epoch(1)
    assert isinstance(mapped.pieces, np.memmap)
    for name in ("pieces", "offsets", "spans"):
        assert np.array_equal(getattr(mapped, name), getattr(memory.epoch(1), name))
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    assert len(again.epoch(1)) == len(mapped)
    assert path.stat().st_mtime_ns == before


def test_a_damaged_plan_file_is_made_again(mixture, tmp_path, caplog):
    plans = Plans(mixture, PlanConfig(40), 5, tmp_path)
    expected = plans.epoch(0).pieces.tobytes()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert Plans(mixture, PlanConfig(40), 5, tmp_path).epoch(0).pieces.tobytes() == expected
    assert str(path) in caplog.text


def test_every_damage_to_a_plan_file_is_found_and_the_file_named(mixture, tmp_path):
    plan = Plans(mixture, PlanConfig(40), 5).epoch(0)
    path = tmp_path / "a.plan"
    write_plan(path, plan, "right")
    content = path.read_bytes()
    with pytest.raises(PlanFileError, match=r"a\.plan: plan right, expected wrong"):
        read_plan(path, "wrong")
    for place in range(0, len(content), 13):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(PlanFileError, match=r"a\.plan"):
            read_plan(path, "right")
    for size in (0, 5, 40, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(PlanFileError, match=r"a\.plan"):
            read_plan(path, "right")
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]

"""Framing and packing: nothing lost, nothing split that must stay whole, no sequence too long."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3jax.data.framing import CLOSES, OPENS, frame_samples, framed_ids
from cm3jax.data.packing import MARKS_PER_SPAN, pack_cut, pack_whole
from cm3jax.data.samples import Samples


def make_samples(documents_per_sample: list[int]) -> Samples:
    offsets = np.cumsum([0, *documents_per_sample])
    return Samples(offsets, np.arange(offsets[-1]))


@st.composite
def packing_problems(draw):
    samples = make_samples(draw(st.lists(st.integers(1, 4), min_size=1, max_size=20)))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    lengths = rng.integers(0, 31, len(samples.records), np.int32)
    return samples, lengths, draw(st.integers(12, 60)), rng.integers(0, 3, 500)


def test_a_sample_of_three_documents_is_framed_as_in_the_paper(tiny_vocabulary):
    documents = frame_samples(make_samples([3, 1]), np.array([2, 2, 0, 1]))
    assert documents.frames.tolist() == [OPENS, 0, CLOSES, OPENS | CLOSES]
    assert documents.lengths.tolist() == [3, 3, 2, 3]
    eos, break_id = tiny_vocabulary.eos, tiny_vocabulary.break_id
    ids = [[10, 11], [12, 13], [], [14]]
    framed = [framed_ids(np.array(i), f, tiny_vocabulary) for i, f in zip(ids, documents.frames.tolist(), strict=True)]
    assert np.concatenate(framed).tolist() == [eos, 10, 11, break_id, 12, 13, break_id, eos, eos, 14, eos]


@given(packing_problems())
@settings(deadline=None)
def test_cut_covers_every_token_once_and_in_order(problem):
    samples, lengths, tokens, spans = problem
    documents = frame_samples(samples, lengths)
    plan = pack_cut(documents, tokens, spans)
    stream = [(record, i) for record, n in zip(documents.records, documents.lengths, strict=True) for i in range(n)]
    packed = [(p["record"], p["first"] + i) for p in plan.pieces for i in range(p["length"])]
    assert packed == stream
    assert np.all(plan.pieces["length"] > 0)
    used = [plan.pieces_of(i)["length"].sum() for i in range(len(plan))]
    capacity = tokens - MARKS_PER_SPAN * plan.spans.astype(int)
    assert np.array_equal(used[:-1], capacity[:-1])
    assert 0 < used[-1] <= capacity[-1]
    assert np.array_equal(plan.spans, spans[: len(plan)])


def test_cut_refuses_too_few_span_counts():
    documents = frame_samples(make_samples([1]), np.array([38]))
    with pytest.raises(ValueError, match="3 span counts do not cover 40 tokens"):
        pack_cut(documents, 13, np.zeros(3, int))


@given(packing_problems(), st.integers(0, 3))
@settings(deadline=None)
def test_whole_places_each_sample_that_fits_once_and_unsplit(problem, seed):
    samples, lengths, tokens, spans = problem
    documents = frame_samples(samples, lengths)
    plan = pack_whole(samples, documents, tokens, spans, np.random.default_rng(seed))
    sizes = [int(documents.lengths[a:b].sum()) for a, b in zip(samples.offsets[:-1], samples.offsets[1:], strict=True)]
    expected = [range(a, b) for a, b in zip(samples.offsets[:-1], samples.offsets[1:], strict=True)]
    fitting = [tuple(rows) for rows, size in zip(expected, sizes, strict=True) if size <= tokens]
    placed = []
    for i in range(len(plan)):
        pieces = plan.pieces_of(i)
        assert len(pieces)
        assert pieces["length"].sum() + MARKS_PER_SPAN * int(plan.spans[i]) <= tokens
        cuts = np.flatnonzero(pieces["frame"] & OPENS)
        placed += [tuple(rows.tolist()) for rows in np.split(pieces["record"], cuts[1:])]
    assert sorted(placed) == fitting
    assert np.all(plan.pieces["first"] == 0)
    assert np.array_equal(plan.pieces["length"], documents.lengths[plan.pieces["record"]])
    assert plan.skipped == len(samples.records) - len(plan.pieces)


def test_whole_fills_best_fit_and_gives_up_spans_only_where_a_sample_needs_the_room():
    samples = make_samples([1] * 6)
    documents = frame_samples(samples, np.array([18, 8, 8, 17, 3, 30]))  # framed 20, 10, 10, 19, 5, 32
    plan = pack_whole(samples, documents, 26, np.full(6, 2), np.random.default_rng(0))
    rows = {tuple(sorted(plan.pieces_of(i)["record"].tolist())): int(plan.spans[i]) for i in range(len(plan))}
    assert rows == {(0,): 2, (3,): 2, (1, 2): 2, (4,): 2}
    assert plan.skipped == 1
    crowded = pack_whole(samples, documents, 22, np.full(6, 2), np.random.default_rng(0))
    assert {tuple(crowded.pieces_of(i)["record"].tolist()): int(crowded.spans[i]) for i in range(len(crowded))} == {
        (0,): 0,
        (3,): 1,
        (2, 4): 2,
        (1,): 2,
    }


def test_whole_puts_a_sample_where_it_leaves_the_least_room():
    samples = make_samples([1] * 3)
    documents = frame_samples(samples, np.array([60, 70, 18]))
    plan = pack_whole(samples, documents, 100, np.zeros(3, int), np.random.default_rng(0))
    assert sorted(plan.pieces_of(i)["record"].tolist() for i in range(len(plan))) == [[0], [1, 2]]


def test_whole_does_not_leave_the_sequences_in_order_of_length():
    samples = make_samples([1] * 200)
    documents = frame_samples(samples, np.arange(200) % 50 + 30)
    plan = pack_whole(samples, documents, 82, np.zeros(200, int), np.random.default_rng(0))
    first = documents.lengths[plan.pieces["record"][plan.offsets[:-1]]]
    assert abs(np.corrcoef(np.arange(len(first)), first)[0, 1]) < 0.3

"""The CM3 objective: what goes in comes out, and every rule on spans holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3jax.data.cm3 import CM3Config, invert, transform
from cm3jax.data.spans import choose_spans, segments
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=64, image_size=32, sentinels=40, size=256)
EOS, BREAK, PAD, EOSS = VOCABULARY.eos, VOCABULARY.break_id, VOCABULARY.pad, VOCABULARY.eoss

boundaries = st.sampled_from([EOS, BREAK])
ordinary = st.integers(4, VOCABULARY.image_end - 1)


@st.composite
def blocks(draw):
    """Ids, a span count that they have room for, and the length."""
    weighted = st.one_of(ordinary, ordinary, ordinary, boundaries)
    ids = np.array(draw(st.lists(weighted, min_size=1, max_size=80)), np.int32)
    spans = draw(st.integers(0, 12))
    return ids, spans, len(ids) + 3 * spans - 1 + draw(st.integers(0, 5))


def maskable(ids):
    return int(np.sum(~VOCABULARY.is_boundary(ids[1:])))


@given(blocks(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_transform_is_undone_by_invert_and_keeps_every_rule(block, whole_segment, seed):
    ids, spans, length = block
    config = CM3Config(whole_segment)
    tokens, weights = transform(ids, spans, length, np.random.default_rng(seed), config, VOCABULARY)
    placed = min(spans, maskable(ids))
    used = len(ids) + 3 * placed
    assert tokens.shape == weights.shape == (length + 1,)
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
    assert np.array_equal(invert(tokens, VOCABULARY), ids)
    assert np.array_equal(weights, np.arange(length + 1) < used)
    assert np.all(tokens[used:] == PAD)
    assert np.sum(tokens == EOSS) == placed
    marks = tokens[VOCABULARY.is_sentinel(tokens)] - VOCABULARY.sentinel_start
    assert marks.tolist() == 2 * list(range(placed))
    chosen = choose_spans(ids, spans, whole_segment, np.random.default_rng(seed), VOCABULARY)
    assert len(chosen) == placed
    assert all(1 <= start < end <= len(ids) for start, end in chosen)
    assert all(end <= start for (_, end), (start, _) in zip(chosen, chosen[1:], strict=False))
    assert not any(VOCABULARY.is_boundary(ids[start:end]).any() for start, end in chosen)


def test_a_masked_caption_reads_as_documented():
    ids = np.array([EOS, 10, 11, BREAK, 70, 71, EOS])
    config = CM3Config(whole_segment=1.0)
    outputs = {
        tuple(transform(ids, 1, 9, np.random.default_rng(seed), config, VOCABULARY)[0].tolist()) for seed in range(20)
    }
    hole = VOCABULARY.sentinel(0)
    assert outputs == {
        (EOS, hole, BREAK, 70, 71, EOS, hole, 10, 11, EOSS),
        (EOS, 10, 11, BREAK, hole, EOS, hole, 70, 71, EOSS),
    }


def test_segments_leave_out_the_first_token_and_the_boundaries():
    assert segments(np.array([10, 11, BREAK, BREAK, 70, EOS, 12]), VOCABULARY).tolist() == [[1, 2], [4, 5], [6, 7]]
    assert segments(np.array([BREAK, EOS]), VOCABULARY).tolist() == []
    assert segments(np.array([], np.int32), VOCABULARY).tolist() == []


def test_whole_segments_are_only_those_with_both_ends_in_the_block():
    ids = np.array([70, 71, EOS, 10, 11, BREAK, 72, 73])
    for seed in range(30):
        assert choose_spans(ids, 1, 1.0, np.random.default_rng(seed), VOCABULARY) == [(3, 5)]


def paired_block(rng, size):
    """A stretch of a stream of pairs, cut anywhere: captions of 4 ids, images of 60."""
    pair = np.concatenate([[EOS], np.full(4, 10), [BREAK], np.full(60, 70), [EOS]])
    start = rng.integers(len(pair))
    return np.tile(pair, size // len(pair) + 2)[start : start + size]


@pytest.mark.parametrize("whole_segment", [0.0, 0.5, 1.0])
def test_share_of_masked_captions_is_as_configured(whole_segment):
    count, size, rng = 10_000, 270, np.random.default_rng(1)
    hits, expected = 0, 0.0
    for _ in range(count):
        ids = paired_block(rng, size)
        runs = segments(ids, VOCABULARY)
        complete = [(a, b) for a, b in runs.tolist() if b < size and VOCABULARY.is_boundary(ids[a - 1])]
        expected += whole_segment * np.mean([b - a == 4 for a, b in complete])
        (span,) = choose_spans(ids, 1, whole_segment, rng, VOCABULARY)
        hits += span in complete and span[1] - span[0] == 4
    slack = 4 * np.sqrt(expected)
    uniform_hits = 0.01 * count  # more than uniform spans reach by chance in blocks this short
    assert expected - slack <= hits <= expected + slack + uniform_hits
    if whole_segment:
        assert 0.4 < hits / (whole_segment * count) < 0.6  # captions and images alike


def test_uniform_spans_have_the_length_of_two_uniform_draws():
    ids = np.concatenate([[EOS], np.full(999, 70)])
    rng = np.random.default_rng(0)
    lengths = [end - start for start, end in (choose_spans(ids, 1, 0.0, rng, VOCABULARY)[0] for _ in range(4000))]
    # The distance of two uniform draws has mean 1/3 and standard deviation sqrt(1/18).
    assert abs(np.mean(lengths) / 1000 - 1 / 3) < 4 * np.sqrt(1 / 18 / 4000)


def test_loss_on_sentinels_can_be_turned_off():
    ids = np.array([EOS, 10, 11, 12, BREAK, 70, 71, 72, EOS])
    config = CM3Config(loss_on_sentinels=False)
    tokens, weights = transform(ids, 2, 20, np.random.default_rng(0), config, VOCABULARY)
    assert np.array_equal(weights, ~VOCABULARY.is_sentinel(tokens) & (tokens != PAD))
    assert np.sum(weights) == len(ids) + 2  # and the two <eoss>


def test_same_seed_same_spans_and_other_seeds_other_spans():
    ids = np.concatenate([[EOS], np.full(200, 70), [EOS]])

    def draw(seed):
        return tuple(choose_spans(ids, 3, 0.5, np.random.default_rng(seed), VOCABULARY))

    assert draw(3) == draw(3)
    assert len({draw(seed) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("ids", "spans", "message"),
    [
        ([EOS] * 9, 1, "9 ids and the marks of 1 spans do not fit in 11 tokens"),
        ([EOS, 10, EOSS], 0, "<eoss> at position 2"),
        ([EOS, VOCABULARY.sentinel(3)], 0, "<sentinel:3> at position 1"),
        ([EOS, 10, BREAK, *range(10, 16)], 0, None),
    ],
)
def test_ids_that_cannot_be_transformed_are_refused(ids, spans, message):
    def call():
        return transform(np.array(ids), spans, 10, np.random.default_rng(0), CM3Config(), VOCABULARY)

    if message is None:
        call()
        return
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "tail", [[10], [VOCABULARY.sentinel(0)], [VOCABULARY.sentinel(0), 10], [VOCABULARY.sentinel(1), EOSS]]
)
def test_invert_refuses_what_transform_does_not_write(tail):
    with pytest.raises(ValueError, match="not a CM3 sequence"):
        invert(np.array([EOS, VOCABULARY.sentinel(0), 11, *tail]), VOCABULARY)


def test_invert_of_padding_alone_is_empty():
    assert invert(np.full(4, PAD), VOCABULARY).tolist() == []

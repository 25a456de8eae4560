"""The unified id space."""

import numpy as np
import pytest

from cm3jax.tokens.vocabulary import Vocabulary


def test_paper_layout():
    v = Vocabulary()
    assert (v.image_start, v.image_end, v.break_id, v.eoss) == (56_320, 64_512, 64_512, 64_513)
    assert v.sentinel_start == 64_514
    assert v.size == 65_536 and v.used == 64_514 + 512
    assert v.dtype == np.uint16


def test_every_id_has_one_kind(tiny_vocabulary):
    v = tiny_vocabulary
    ids = np.arange(v.size)
    control = np.isin(ids, [v.bos, v.pad, v.eos, v.unk])
    marks = np.isin(ids, [v.break_id, v.eoss])
    kinds = [control, v.is_text(ids), v.is_image(ids), marks, v.is_sentinel(ids), ids >= v.used]
    np.testing.assert_array_equal(np.sum(kinds, axis=0), np.ones(v.size))


def test_codes_round_trip_and_ids_fit_the_dtype(tiny_vocabulary):
    v = tiny_vocabulary
    codes = np.arange(v.image_size)
    np.testing.assert_array_equal(v.image_code(v.image_id(codes)), codes)
    assert v.is_image(v.image_id(codes)).all()
    assert Vocabulary(size=(1 << 16) + 1).dtype == np.uint32


def test_boundaries_are_break_end_and_padding(tiny_vocabulary):
    v = tiny_vocabulary
    assert np.flatnonzero(v.is_boundary(np.arange(v.size))).tolist() == sorted([v.pad, v.eos, v.break_id])


def test_names_are_unique(tiny_vocabulary):
    names = [tiny_vocabulary.name(i) for i in range(tiny_vocabulary.size)]
    assert len(set(names)) == len(names)
    assert tiny_vocabulary.name(tiny_vocabulary.sentinel(3)) == "<sentinel:3>"


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="do not fit in size 100"):
        Vocabulary(text_size=64, image_size=64, sentinels=8, size=100)
    with pytest.raises(ValueError, match="image_size 0"):
        Vocabulary(image_size=0)
    with pytest.raises(ValueError, match="sentinel 512 out of range"):
        Vocabulary().sentinel(512)

"""Scenes: the space, its split, and the source that serves it."""

import collections
import dataclasses

import numpy as np
import pytest

from cm3jax.data.scenes.space import ATTRIBUTES, SPLITS, Scene, held_out, sample, triples
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.data.sources.source import Source
from cm3jax.tokens.document import Image, Text

EXPECTED_FIRST = {
    "subject": "cactus",
    "color": "orange",
    "place": "grass",
    "sky": "dawn",
    "item": "flag",
    "count": "four",
    "position": "right",
}


def test_a_scene_depends_on_seed_split_and_index_alone():
    assert sample(3, "train", 7) == sample(3, "train", 7)
    others = [sample(4, "train", 7), sample(3, "valid", 7), sample(3, "train", 8)]
    assert all(other.layout != sample(3, "train", 7).layout for other in others)


def test_the_sampled_scene_stays_what_it_was():
    """Seeds written into reports must give the same scenes on any machine and with any NumPy."""
    assert sample(0, "train", 0).attributes == EXPECTED_FIRST


def test_no_combination_of_valid_occurs_in_train():
    train, valid = triples("train"), triples("valid")
    assert not set(train) & set(valid)
    assert len(train) + len(valid) == 9 * 8 * 8
    assert len(valid) == 9 * 8
    for split in SPLITS:
        assert all(held_out(sample(0, split, i).triple) == (split == "valid") for i in range(200))


def test_the_split_holds_every_value_out_equally_often():
    for position, (name, expected) in enumerate((("subject", 8), ("color", 9), ("place", 9))):
        counts = collections.Counter(triple[position] for triple in triples("valid"))
        assert counts == dict.fromkeys(ATTRIBUTES[name], expected)


def test_values_are_drawn_evenly():
    scenes = [sample(0, "train", i) for i in range(1000)]
    for name, values in ATTRIBUTES.items():
        counts = collections.Counter(getattr(scene, name) for scene in scenes)
        expected = 1000 / len(values)
        # Five standard deviations of a binomial.
        assert all(abs(counts[value] - expected) < 5 * np.sqrt(expected) for value in values), counts


def test_a_wrong_value_is_named():
    with pytest.raises(ValueError, match="scene item: 'top hat' is not one of straw hat"):
        dataclasses.replace(sample(0, "train", 0), item="top hat")
    with pytest.raises(ValueError, match="year: expected four digits, found '84'"):
        dataclasses.replace(sample(0, "train", 0), year="84")
    with pytest.raises(ValueError, match="scenes split: 'test' is not one of train, valid"):
        ScenesSource("test", 3)  # type: ignore[arg-type]


def test_source_serves_caption_picture_and_truth():
    source: Source = ScenesSource("valid", 5, size=32, seed=1)
    document = source[4]
    text, image = document.segments
    scene: Scene = sample(1, "valid", 4)
    assert isinstance(text, Text) and isinstance(image, Image)
    assert image.pixels is not None and image.pixels.shape == (32, 32, 3) and image.pixels.dtype == np.uint8
    assert document.meta["attributes"] == scene.attributes
    assert document.id == "scenes/valid/1/4"
    assert np.array_equal(source[4].segments[1].pixels, image.pixels)
    with pytest.raises(IndexError):
        source[5]
    assert len(list(source)) == len(source) == 5


def test_source_fingerprint_follows_every_argument():
    prints = {
        ScenesSource(split, count, size, seed).fingerprint()
        for split, count, size, seed in (
            ("train", 5, 32, 0),
            ("valid", 5, 32, 0),
            ("train", 6, 32, 0),
            ("train", 5, 48, 0),
            ("train", 5, 32, 1),
        )
    }
    assert len(prints) == 5
    assert ScenesSource("train", 5, 32, 0).fingerprint() in prints

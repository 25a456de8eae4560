"""Pictures by random access: each epoch shuffled, each example repeatable, broken documents replaced."""

import logging
import pickle

import numpy as np
import pytest

from cm3jax.data import images
from cm3jax.data.images import ImageConfig, ImageExamples
from cm3jax.data.loader import batches
from cm3jax.data.sources.source import Reason, RejectError
from cm3jax.tokens.document import Document, Image, Text
from cm3jax.tokens.image import fit

SIZE = 8


class Pictures:
    """Pictures of one colour each, of several shapes; some documents are broken."""

    name = "pictures"

    def __init__(self, shapes, broken=(), textual=()):
        self.shapes, self.broken, self.textual = shapes, set(broken), set(textual)
        self.reads = 0

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        self.reads += 1
        if index in self.broken:
            raise RejectError(Reason.BROKEN_IMAGE, f"picture {index}")
        if index in self.textual:
            return Document((Text("no picture"),), id=str(index))
        return Document((Text("caption"), Image(np.full((*self.shapes[index], 3), index + 1, np.uint8))))

    def fingerprint(self):
        return f"{self.shapes}"


class Gradient(Pictures):
    """Pictures that grow brighter to the right, so that a crop's place and a flip can be read off."""

    def __getitem__(self, index):
        height, width = self.shapes[index]
        row = np.linspace(0, 255, width).astype(np.uint8)
        return Document((Image(np.broadcast_to(row[None, :, None], (height, width, 3)).copy()),))


SHAPES = [(8, 8), (16, 16), (9, 30), (40, 12), (8, 20), (5, 5), (11, 11)]


def colours(examples, epoch):
    n = len(examples.source)
    return [int(examples[i]["image"][0, 0, 0]) - 1 for i in range(epoch * n, (epoch + 1) * n)]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_each_epoch_shows_each_picture_once_in_an_order_of_its_own(crop):
    examples = ImageExamples(Pictures(SHAPES), ImageConfig(SIZE, crop), seed=3)
    orders = [colours(examples, epoch) for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2
    assert orders[0] != orders[1]
    assert all(examples[i]["image"].shape == (SIZE, SIZE, 3) for i in range(7))
    assert examples[0]["image"].dtype == np.uint8


def test_an_example_is_a_pure_function_of_seed_and_index():
    config = ImageConfig(SIZE)
    source = Gradient(SHAPES)
    one, two = (ImageExamples(source, config, seed=3) for _ in range(2))
    expected = [one[i]["image"] for i in range(20)]
    uncached = ImageExamples(source, ImageConfig(SIZE, cache_bytes=0), seed=3)
    for i in reversed(range(20)):
        assert np.array_equal(two[i]["image"], expected[i])
        assert np.array_equal(uncached[i]["image"], expected[i])
        assert np.array_equal(pickle.loads(pickle.dumps(one))[i]["image"], expected[i])
    other = ImageExamples(source, config, seed=4)
    assert any(not np.array_equal(other[i]["image"], expected[i]) for i in range(20))


def test_centre_crop_is_the_one_that_images_are_tokenized_with():
    source = Gradient([(9, 30)])
    examples = ImageExamples(source, ImageConfig(SIZE, "center", flip=False), seed=0)
    assert np.array_equal(examples[5]["image"], fit(source[0].segments[0].pixels, SIZE))


def test_random_crops_reach_both_ends_and_flips_are_half():
    examples = ImageExamples(Gradient([(SIZE, 4 * SIZE)]), ImageConfig(SIZE), seed=0)
    squares = [examples[i]["image"][0, :, 0].astype(int) for i in range(300)]
    flipped = [square[0] > square[-1] for square in squares]
    assert abs(sum(flipped) - 150) < 4 * np.sqrt(75)
    assert min(square.min() for square in squares) < 10
    assert max(square.max() for square in squares) > 245


@pytest.mark.parametrize("shape", [(2, 4000), (4000, 2)])
def test_a_picture_of_extreme_shape_stays_small(shape):
    examples = ImageExamples(Pictures([shape]), ImageConfig(SIZE), seed=0)
    examples[0]
    assert examples._cached_bytes == SIZE * images.MAX_ASPECT * SIZE * 3


def test_broken_documents_are_replaced_by_the_next_good_one_and_counted(caplog):
    source = Pictures(SHAPES, broken={2, 6}, textual={3})
    examples = ImageExamples(source, ImageConfig(SIZE, flip=False), seed=3)
    whole = ImageExamples(Pictures(SHAPES), ImageConfig(SIZE, flip=False), seed=3)
    replaced = {2: 4, 3: 4, 6: 0}
    with caplog.at_level(logging.WARNING):
        assert colours(examples, 0) == [replaced.get(colour, colour) for colour in colours(whole, 0)]
    assert examples.rejected == 3
    assert sum("is replaced by the next" in line for line in caplog.messages) == 3
    reads = source.reads
    colours(examples, 1)
    assert source.reads == reads  # good ones are cached, bad ones remembered


def test_a_source_without_any_picture_is_an_error():
    with pytest.raises(RejectError, match="none of 2 documents of pictures has a picture"):
        ImageExamples(Pictures(SHAPES[:2], broken={0, 1}), ImageConfig(SIZE), seed=0)[0]
    with pytest.raises(ValueError, match="no documents in source pictures"):
        ImageExamples(Pictures([]), ImageConfig(SIZE), seed=0)


def test_the_cache_stops_at_its_limit():
    source = Pictures([(SIZE, SIZE)] * 10)
    one_picture = SIZE * SIZE * 3
    examples = ImageExamples(source, ImageConfig(SIZE, cache_bytes=4 * one_picture), seed=0)
    colours(examples, 0)
    assert source.reads == 10
    colours(examples, 1)
    assert source.reads == 16


def test_fingerprint_follows_what_changes_examples_and_not_the_cache():
    def fingerprint(shapes=(8, 8), seed=0, **changes):
        return ImageExamples(Pictures([shapes]), ImageConfig(**{"size": SIZE} | changes), seed).fingerprint

    variants = [fingerprint(), fingerprint(seed=1), fingerprint(size=9), fingerprint(flip=False), fingerprint((9, 9))]
    assert len(set(variants)) == len(variants)
    assert fingerprint(cache_bytes=7) == fingerprint()


def test_bad_indices_and_configs_are_refused():
    with pytest.raises(IndexError, match="-1"):
        ImageExamples(Pictures(SHAPES), ImageConfig(SIZE), seed=0)[-1]
    with pytest.raises(ValueError, match="size >= 1"):
        ImageConfig(0)


def test_images_go_through_the_loader():
    examples = ImageExamples(Gradient(SHAPES), ImageConfig(SIZE), seed=1)
    (batch,) = batches(examples, 4, start=2, steps=1)
    assert np.array_equal(batch["image"], np.stack([examples[i]["image"] for i in range(8, 12)]))

"""Pictures of scenes and their truth maps."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cm3jax.data.scenes.drawing import draw
from cm3jax.data.scenes.render import render
from cm3jax.data.scenes.shapes import CLASSES
from cm3jax.data.scenes.space import ATTRIBUTES, sample
from cm3jax.data.scenes.truth import truth

SCENES = [sample(2, "train", i) for i in range(24)]


def test_the_same_scene_gives_the_same_pixels():
    assert np.array_equal(render(SCENES[0], 64), render(SCENES[0], 64))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_of_every_attribute_can_be_drawn_and_seen(attribute):
    pictures = [render(SCENES[1].with_value(attribute, value), 64).astype(int) for value in ATTRIBUTES[attribute]]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.mean(np.abs(a - b).max(-1) > 40) > 0.005  # half a percent of the pixels clearly differ


def test_the_small_picture_is_the_large_one_seen_from_afar():
    for scene in SCENES[:8]:
        reduced = np.asarray(Image.fromarray(render(scene, 256)).reduce(4)).astype(int)
        assert np.mean(np.abs(reduced - render(scene, 64))) < 4.0  # of 255; strokes round to whole canvas pixels


def test_sizes_out_of_range_are_refused():
    for size in (8, 2048):
        with pytest.raises(ValueError, match=f"scene size: {size} pixels, expected 16 to 1024"):
            render(SCENES[0], size)


def test_a_lone_subject_is_large():
    for scene in (dataclasses.replace(s, count="one") for s in SCENES):
        ((x0, y0, x1, y1),) = draw(scene).boxes
        assert 0.35 <= y1 - y0 <= 0.65


def test_position_moves_the_boxes():
    def middle(scene):
        boxes = np.array(draw(scene).boxes)
        return (boxes[:, 0].min() + boxes[:, 2].max()) / 2

    for scene in SCENES:
        left, center, right = (middle(dataclasses.replace(scene, position=p)) for p in ATTRIBUTES["position"])
        assert left + 0.1 < center < right - 0.1


def test_there_is_one_box_per_subject_and_it_holds_subject_pixels():
    subject = CLASSES.index("subject")
    for scene in SCENES:
        maps = truth(draw(scene), 128)
        assert maps.boxes.shape == (scene.number, 4)
        inside = np.zeros((128, 128), bool)
        for x0, y0, x1, y1 in maps.boxes * 128:
            box = np.s_[int(y0) : int(np.ceil(y1)) + 1, int(x0) : int(np.ceil(x1)) + 1]
            assert np.mean(maps.segmentation[box] == subject) > 0.3
            inside[box] = True
        assert not np.any((maps.segmentation == subject) & ~inside)


def test_segmentation_agrees_with_the_picture():
    """Away from edges every pixel of the picture has the flat colour of what the maps say is there."""
    for scene in SCENES:
        red = dataclasses.replace(scene, subject="cactus", color="red", count="one")
        blue = dataclasses.replace(red, color="blue")
        changed = np.any(render(red, 64) != render(blue, 64), axis=-1)
        maps = truth(draw(red), 64)
        subject = maps.segmentation == CLASSES.index("subject")
        flat = np.ones((64, 64), bool)
        for shift in ((0, 0), (0, 1), (1, 0), (1, 1), (0, -1), (-1, 0), (-1, -1), (1, -1), (-1, 1)):
            flat &= np.roll(maps.edges, shift, (0, 1)) == 0
        assert not np.any(changed & flat & ~subject)
        assert np.sum(changed & flat & subject) > 20


def test_depth_grows_towards_the_horizon():
    for scene in SCENES:
        maps = truth(draw(scene), 64)
        assert np.all(maps.depth[maps.segmentation == CLASSES.index("sky")] == 255)
        bottom, subject = maps.depth[-1], maps.depth[maps.segmentation == CLASSES.index("subject")]
        assert bottom.mean() < 80 and subject.max() < 240


def test_edges_are_black_or_white_and_follow_outlines():
    for scene in SCENES[:6]:
        maps = truth(draw(scene), 64)
        assert set(np.unique(maps.edges)) == {0, 255}
        assert 0.02 < np.mean(maps.edges == 255) < 0.6
        across = maps.segmentation[:, :-1] != maps.segmentation[:, 1:]
        assert np.all(maps.edges[:, :-1][across] == 255)


def test_the_year_is_drawn_on_stop_signs_alone():
    for scene in SCENES[:4]:
        for subject, seen in (("stop sign", True), ("sheep", False)):
            a = render(dataclasses.replace(scene, subject=subject, year="1111"), 64)
            b = render(dataclasses.replace(scene, subject=subject, year="2088"), 64)
            assert np.any(a != b) == seen

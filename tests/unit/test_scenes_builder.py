"""Edits, questions, and the data set on disk."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from cm3jax.data.scenes.builder import Scenes, ScenesConfig
from cm3jax.data.scenes.drawing import draw
from cm3jax.data.scenes.edits import sample_edit
from cm3jax.data.scenes.language import parse_caption, short_caption
from cm3jax.data.scenes.questions import questions
from cm3jax.data.scenes.render import render
from cm3jax.data.scenes.space import ATTRIBUTES, held_out, sample
from cm3jax.data.scenes.truth import truth


def test_an_edit_changes_one_attribute_and_nothing_else():
    edits = [sample_edit(0, "train", i) for i in range(300)]
    assert {edit.attribute for edit in edits} == set(ATTRIBUTES)
    for edit in edits:
        before, after = edit.before.attributes, edit.after.attributes
        assert [name for name in ATTRIBUTES if before[name] != after[name]] == [edit.attribute]
        assert edit.before.layout == edit.after.layout
        assert not held_out(edit.after.triple)
        assert parse_caption(edit.instruction)[edit.attribute] == after[edit.attribute] or edit.attribute == "subject"
    assert sample_edit(0, "valid", 5) == sample_edit(0, "valid", 5)


def test_questions_are_answered_by_the_scene():
    kinds = set()
    yes = collections.Counter()
    for scene in (sample(0, "train", i) for i in range(300)):
        asked = {question.kind: question for question in questions(scene)}
        kinds |= set(asked)
        for name in ATTRIBUTES:
            if name == "count":
                assert asked[name].answer == scene.count
            else:
                assert parse_caption(asked[name].answer) == {name: getattr(scene, name)}
        assert ("year" in asked) == (scene.subject == "stop sign")
        for name in ("color", "sky"):
            question = asked[f"is {name}"]
            stated = parse_caption(question.question)[name]
            assert question.answer == ("yes" if stated == getattr(scene, name) else "no")
            yes[question.answer] += 1
    assert len(kinds) == 10
    assert 200 < yes["yes"] < 400


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    config = ScenesConfig(name="tiny", size=32, train=6, valid=3, truth=True)
    builder = Scenes(config=config, data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return builder


def test_the_data_set_reads_back_as_drawn(built):
    examples = {example["id"].decode(): example for example in built.as_data_source(split="train")}
    assert len(examples) == 6 and len(built.as_data_source(split="valid")) == 3
    for index in range(6):
        example, scene = examples[f"scenes/train/0/{index}"], sample(0, "train", index)
        maps, edit = truth(draw(scene), 32), sample_edit(0, "train", index)
        assert np.array_equal(example["image"], render(scene, 32))
        assert example["caption"].decode() == short_caption(scene)
        assert {name: value.decode() for name, value in example["attributes"].items()} == scene.attributes
        for name in ("segmentation", "depth", "edges"):
            assert np.array_equal(example[name][..., 0], getattr(maps, name))
        np.testing.assert_allclose(np.array(example["boxes"])[:, [1, 0, 3, 2]], maps.boxes, atol=1e-6)
        assert example["edit"]["instruction"].decode() == edit.instruction
        assert np.array_equal(example["edit"]["image"], render(edit.after, 32))
        answers = [answer.decode() for answer in example["questions"]["answer"]]
        assert answers == [question.answer for question in questions(scene)]


def test_the_data_set_is_array_record_and_opens_by_directory(built):
    import tensorflow_datasets as tfds

    assert built.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    again = tfds.builder_from_directory(str(built.data_dir)).as_data_source(split="valid")
    assert len(again) == 3


def test_building_needs_no_tensorflow():
    program = (
        "import sys, tempfile, tensorflow_datasets as tfds\n"
        "import cm3jax.data.scenes.builder as b\n"
        "tfds.disable_progress_bar()\n"
        "config = b.ScenesConfig(name='t', size=16, train=1, valid=1)\n"
        "made = b.Scenes(config=config, data_dir=tempfile.mkdtemp())\n"
        "made.download_and_prepare()\n"
        "assert made.as_data_source(split='train')[0]['image'].shape == (16, 16, 3)\n"
        "assert tfds.builder_cls('scenes') is b.Scenes\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

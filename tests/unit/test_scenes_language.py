"""Captions of scenes say everything, and are read back whole."""

import re

import pytest

from cm3jax.data.scenes.language import long_caption, parse_caption, parse_year, short_caption
from cm3jax.data.scenes.space import sample

SCENES = [sample(1, split, i) for split in ("train", "valid") for i in range(300)]


@pytest.mark.parametrize("caption", [short_caption, long_caption])
def test_captions_are_read_back_whole(caption):
    for scene in SCENES:
        assert parse_caption(caption(scene)) == scene.attributes, caption(scene)


def test_case_and_punctuation_do_not_matter():
    for scene in SCENES[:100]:
        noisy = re.sub(r"[,.:]", " ;", long_caption(scene).upper())
        assert parse_caption(noisy) == scene.attributes


def test_what_is_not_said_is_absent():
    assert parse_caption("") == {}
    assert parse_caption("two dogs") == {"subject": "dog", "count": "two"}
    assert parse_caption("a blue blue sword the the city city left") == {
        "color": "blue",
        "place": "city",
        "item": "sword",
        "count": "one",
        "position": "left",
    }
    assert parse_caption("redwood, noontime, cupboard") == {}


def test_the_first_of_two_values_counts():
    assert parse_caption("a red dog and three blue cats with a flag") == {
        "subject": "dog",
        "color": "red",
        "item": "flag",
        "count": "one",
    }


def test_an_arrangement_is_not_a_count():
    assert parse_caption("they stand one behind two in the center") == {"position": "center"}


def test_short_captions_are_short_and_the_words_are_few():
    words = set()
    for scene in SCENES:
        assert len(short_caption(scene).split()) <= 19
        words |= set(re.findall("[a-z]+", (short_caption(scene) + " " + long_caption(scene)).lower()))
    assert len(words) <= 100


def test_only_stop_signs_state_a_year():
    for scene in SCENES:
        expected = scene.year if scene.subject == "stop sign" else None
        assert parse_year(short_caption(scene)) == parse_year(long_caption(scene)) == expected

"""Rules of text and shape: what they measure, and what they refuse in any language."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3jax.data.ingest.rules import (
    check_key,
    check_shape,
    check_text,
    control_characters,
    letter_share,
    longest_run,
    top_word_share,
)
from cm3jax.data.ingest.settings import IngestConfig
from cm3jax.data.sources.source import Reason, RejectError

CONFIG = IngestConfig()


def refused(text: str, **changes) -> Reason | None:
    try:
        check_text(text, "k", IngestConfig(**changes))
    except RejectError as error:
        assert error.key == "k" and error.detail
        return error.reason
    return None


@pytest.mark.parametrize(
    "text",
    [
        "A dog sleeping on a show rack in the shoes.",
        "2 dogs",
        "Ein Hund schläft im Regal (1998), siehe https://example.org/a?b=c",
        "一只狗睡在鞋架上。",
        "कुत्ता जूतों के बीच सो रहा है",
        "สุนัขนอนหลับอยู่บนชั้นวางรองเท้า",
        "كلب نائم على رف الأحذية",
        "tab\tand\r\nline ends",
        "the cat and the dog and the bird and the fish",
        "no no no no no no no",
    ],
)
def test_captions_of_many_languages_pass(text):
    assert refused(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.TEXT_TOO_SHORT),
        (" a \n b ", Reason.TEXT_TOO_SHORT),
        ("word " * 2_501, Reason.TEXT_TOO_LONG),
        ("a dog\0", Reason.CONTROL_CHARACTERS),
        ("a dog \x1b[0m", Reason.CONTROL_CHARACTERS),
        ("caf\ufffd on a table", Reason.CONTROL_CHARACTERS),
        ("https://example.org/picture", Reason.ONLY_URLS),
        ("www.example.org\nHTTP://example.org/2.jpg", Reason.ONLY_URLS),
        ("IMG_20230101_120000.jpg", Reason.FEW_LETTERS),
        ("$ 19.99 - 24.99", Reason.FEW_LETTERS),
        ("goooooooooooal", Reason.REPEATED_TEXT),
        ("buy " * 8, Reason.REPEATED_TEXT),
        ("Buy buy BUY now buy buy more buy buy", Reason.REPEATED_TEXT),
    ],
)
def test_what_is_no_caption_is_refused(text, reason):
    assert refused(text) == reason


LETTERS = st.characters(categories=["Lu", "Ll", "Lt", "Lm", "Lo"])
PRINTABLE = st.characters(exclude_categories=["Cc", "Cs"])


@given(st.text(LETTERS, min_size=1), st.integers(0, 60))
def test_letter_share_counts_letters_of_every_script(letters, digits):
    assert letter_share(letters + " \n" + "7" * digits) == len(letters) / (len(letters) + digits)


@given(st.text(PRINTABLE))
def test_measures_stay_in_their_range_and_ignore_outer_space(text):
    assert 0 <= letter_share(text) <= 1 and 0 <= top_word_share(text) <= 1
    assert 0 <= longest_run(text) <= len(text)
    for measure in (letter_share, longest_run, top_word_share):
        assert measure(f" {text}\n") == measure(text)


@given(st.text(st.sampled_from("abc "), max_size=40), st.integers(1, 30))
def test_longest_run_finds_a_planted_run(text, run):
    assert longest_run(text + "x" * run + text) >= run
    assert longest_run(text) == max((len(part) for part in _runs(text)), default=0)


def _runs(text):
    """Runs of one character, found one by one."""
    runs, current = [], ""
    for character in text:
        current = current + character if current and current[-1] == character else character
        runs.append(current)
    return [run for run in runs if run.strip()]


@given(st.lists(st.sampled_from(["a", "B", "b"]), min_size=8, max_size=30))
def test_top_word_share_ignores_case(words):
    lower = [word.lower() for word in words]
    assert top_word_share("  ".join(words)) == max(lower.count("a"), lower.count("b")) / len(words)


@given(st.text(PRINTABLE), st.characters(categories=["Cc"], exclude_characters="\t\n\r"))
def test_every_control_character_is_found(text, control):
    assert control_characters(text + control + text).count(control) == 1
    assert all(unicodedata.category(c) == "Cc" or c == "\ufffd" for c in control_characters(text))


@given(st.integers(1, 5_000), st.integers(1, 5_000))
def test_shape_bounds_are_exact_and_the_same_for_both_sides(height, width):
    reasons = []
    for sides in ((height, width), (width, height)):
        try:
            check_shape(*sides, "k", CONFIG)
            reasons.append(None)
        except RejectError as error:
            reasons.append(error.reason)
    short, long = sorted((height, width))
    expected = Reason.IMAGE_TOO_SMALL if short < 64 else Reason.EXTREME_ASPECT if long > 4 * short else None
    assert reasons == [expected, expected]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "..", "/etc/passwd", "\\\\host\\x", "a\\..\\x", "a\0b", "a\nb"])
def test_hostile_keys_are_refused(key):
    with pytest.raises(RejectError) as caught:
        check_key(key)
    assert caught.value.reason == Reason.UNSAFE_PATH


@pytest.mark.parametrize("key", ["a/b", "a..b", "https://example.org/1.jpg", "12/3", "...", "bild ä"])
def test_other_keys_are_fine(key):
    check_key(key)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_short_side": 0}, {"max_aspect": 0.5}, {"min_letter_share": 1.1}, {"min_characters": 20_000},
        {"near_distance": 64}, {"jpeg_quality": 0}, {"shard_documents": 0},
    ],
)  # fmt: skip
def test_bounds_outside_their_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        IngestConfig(**changes)

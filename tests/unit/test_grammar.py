import jax
import numpy as np
import pytest

from cm3jax.generate.grammar import AFTER_IMAGE, INFILL, TEXT, Grammar

IMAGE_TOKENS = 3


@pytest.fixture
def grammar(tiny_vocabulary):
    return Grammar(tiny_vocabulary, IMAGE_TOKENS, endings=(tiny_vocabulary.eos,))


def allowed_ids(grammar, phase):
    ids = np.arange(grammar.vocabulary.size)
    return set(ids[np.asarray(grammar.allowed(grammar.start(1, phase), ids))[0]].tolist())


def test_text_goes_on_breaks_or_ends(grammar):
    v = grammar.vocabulary
    text = {i for i in range(v.size) if v.is_text(i)}
    assert allowed_ids(grammar, TEXT) == text | {v.break_id, v.eos}


def test_an_ending_is_allowed_only_if_asked_for(tiny_vocabulary):
    v = tiny_vocabulary
    infill = Grammar(v, IMAGE_TOKENS, endings=(v.eoss, v.eos))
    assert v.eoss in allowed_ids(infill, TEXT)
    assert v.eoss not in allowed_ids(Grammar(v, IMAGE_TOKENS, endings=(v.eos,)), TEXT)


def test_an_infill_has_at_least_one_id(grammar):
    v = grammar.vocabulary
    assert allowed_ids(grammar, INFILL) == {i for i in range(v.size) if v.is_text(i)}
    begun = grammar.advance(grammar.start(1, INFILL), np.array([10]))
    assert int(begun.phase[0]) == TEXT


@pytest.mark.parametrize("phase", [1, IMAGE_TOKENS])
def test_an_image_holds_only_codes(grammar, phase):
    v = grammar.vocabulary
    assert allowed_ids(grammar, phase) == set(range(v.image_start, v.image_end))


def test_after_an_image_only_a_break_or_an_ending(grammar):
    v = grammar.vocabulary
    assert allowed_ids(grammar, AFTER_IMAGE) == {v.break_id, v.eos}


def test_phases_of_a_document(grammar):
    v = grammar.vocabulary
    code = v.image_start
    document = [10, v.break_id, code, code, code, v.break_id, 11, v.break_id, code, code, code, v.eos]
    state, phases, done = grammar.start(1, TEXT), [], []
    advance = jax.jit(grammar.advance)
    for token in document:
        state = advance(state, np.array([token]))
        phases.append(int(state.phase[0]))
        done.append(bool(state.done[0]))
    assert phases == [0, 3, 2, 1, -1, 0, 0, 3, 2, 1, -1, -1]
    assert done == [False] * 11 + [True]


def test_only_the_asked_range_of_ids_is_judged(grammar):
    v = grammar.vocabulary
    codes = np.arange(v.image_start, v.image_end)
    states = grammar.start(2, IMAGE_TOKENS)
    assert np.asarray(grammar.allowed(states, codes)).tolist() == [[True] * v.image_size] * 2

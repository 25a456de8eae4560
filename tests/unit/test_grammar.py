import jax
import numpy as np
import pytest

from cm3jax.generate.grammar import AFTER_IMAGE, INFILL, TEXT, Grammar, GrammarState

IMAGE_TOKENS = 3


@pytest.fixture
def grammar(tiny_vocabulary):
    return Grammar(tiny_vocabulary, IMAGE_TOKENS, text_end=tiny_vocabulary.text_size)


NO_ENDING, EOS, EOSS_AND_EOS = (np.array([row]) for row in ([False] * 3, [False, False, True], [False, True, True]))


def allowed_ids(grammar, phase, endings=EOS):
    ids = np.arange(grammar.vocabulary.size)
    return set(ids[np.asarray(grammar.allowed(np.array([phase]), endings, ids))[0]].tolist())


def state_at(phase):
    return GrammarState(np.array([phase]), np.array([False]))


def test_text_goes_on_breaks_or_ends(grammar):
    v = grammar.vocabulary
    text = {i for i in range(v.size) if v.is_text(i)}
    assert allowed_ids(grammar, TEXT) == text | {v.break_id, v.eos}


def test_an_ending_is_allowed_only_if_asked_for(grammar):
    v = grammar.vocabulary
    assert v.eoss in allowed_ids(grammar, TEXT, EOSS_AND_EOS)
    assert v.eoss not in allowed_ids(grammar, TEXT, EOS)
    assert v.eos not in allowed_ids(grammar, AFTER_IMAGE, NO_ENDING)


def test_text_ids_from_the_end_on_are_not_allowed(tiny_vocabulary):
    found = allowed_ids(Grammar(tiny_vocabulary, IMAGE_TOKENS, text_end=20), INFILL)
    assert found == set(range(4, 20))


def test_an_infill_has_at_least_one_id(grammar):
    v = grammar.vocabulary
    assert allowed_ids(grammar, INFILL) == {i for i in range(v.size) if v.is_text(i)}
    assert int(grammar.advance(state_at(INFILL), EOS, np.array([10])).phase[0]) == TEXT


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
    state, phases, done = state_at(TEXT), [], []
    advance = jax.jit(grammar.advance)
    for token in document:
        state = advance(state, EOS, np.array([token]))
        phases.append(int(state.phase[0]))
        done.append(bool(state.done[0]))
    assert phases == [0, 3, 2, 1, -1, 0, 0, 3, 2, 1, -1, -1]
    assert done == [False] * 11 + [True]


def test_only_the_asked_range_of_ids_is_judged(grammar):
    v = grammar.vocabulary
    codes = np.arange(v.image_start, v.image_end)
    rows = np.array([IMAGE_TOKENS, TEXT])
    found = np.asarray(grammar.allowed(rows, np.repeat(EOS, 2, axis=0), codes))
    assert found.tolist() == [[True] * v.image_size, [False] * v.image_size]

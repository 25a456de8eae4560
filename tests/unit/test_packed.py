import jax
import numpy as np

from cm3jax.data.cm3 import CM3Config, transform
from cm3jax.tokens.packed import PADDING, samples_of

EOS = 2


def numbers(tokens, vocabulary):
    return np.asarray(jax.jit(samples_of, static_argnums=1)(np.array([tokens]), vocabulary))[0].tolist()


def test_samples_stand_between_ends(tiny_vocabulary):
    assert tiny_vocabulary.eos == EOS
    assert numbers([EOS, 9, 9, EOS, EOS, 9, EOS, 1, 1], tiny_vocabulary) == [1, 1, 1, 1, 2, 2, 2, PADDING, PADDING]


def test_a_sequence_may_begin_and_end_within_a_sample(tiny_vocabulary):
    assert numbers([9, 9, EOS, EOS, 9], tiny_vocabulary) == [0, 0, 0, 1, 1]
    assert numbers([EOS, EOS, 9, EOS], tiny_vocabulary) == [1, 2, 2, 2]


def test_infills_belong_to_the_sample_of_their_hole(tiny_vocabulary):
    s0, s1, eoss = tiny_vocabulary.sentinel(0), tiny_vocabulary.sentinel(1), tiny_vocabulary.eoss
    tokens = [EOS, 9, s0, EOS, EOS, s1, 9, EOS, s0, 5, 5, eoss, s1, 6, eoss]
    assert numbers(tokens, tiny_vocabulary) == [1] * 4 + [2] * 4 + [1] * 4 + [2] * 3


def test_the_objective_moves_tokens_but_no_token_changes_its_sample(tiny_vocabulary):
    """Each sample writes its own text id, so that the id tells the sample."""
    ids = np.array([EOS, *[11] * 6, EOS, EOS, *[12] * 9, EOS, EOS, *[13] * 4, EOS])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tokens, _ = transform(ids, 3, 40, rng, CM3Config(), tiny_vocabulary)
        found = np.array(numbers(tokens, tiny_vocabulary))
        for number in (1, 2, 3):
            assert set(tokens[found == number].tolist()) & {11, 12, 13} <= {10 + number}
        assert np.isin(tokens, [11, 12, 13]).sum() == 19

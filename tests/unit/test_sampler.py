import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.generate.sampler import SamplingConfig, draw, noise, penalise, per_row, shape
from cm3jax.tokens.vocabulary import Vocabulary

VECTORS, WIDTH = 10_000, 50
LOGITS = np.random.default_rng(0).normal(0, 2, (VECTORS, WIDTH)).astype(np.float32)
LOGITS[::3, 4] = -np.inf
LOGITS[::7, 6] = LOGITS[::7, 7]

VOCABULARY = Vocabulary(text_size=16, image_size=8, sentinels=2, size=32)
EVERY_ID = (0, VOCABULARY.used)
CODES = (VOCABULARY.image_start, VOCABULARY.image_end)

shaped = jax.jit(shape, static_argnames="cuts")
ALL_CUTS = SamplingConfig(top_k=1, top_p=0.5, min_p=0.5).cuts
drawn = jax.jit(draw, static_argnames="cuts")
noise_of = jax.jit(noise, static_argnames=("ids", "vocabulary"))


def reference(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Plain reading of the definitions, token by token from the most likely."""
    scaled = logits.astype(np.float64) / config.temperature
    order = np.argsort(-scaled, kind="stable")
    if config.top_k and config.top_k < len(order):
        scaled[scaled < scaled[order[config.top_k - 1]]] = -np.inf
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = np.array([p[p > share].sum() < config.top_p for share in p]) if config.top_p < 1 else p > 0
    kept &= (p > 0) & (p >= config.min_p * p.max())
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(top_k=3),
        SamplingConfig(top_k=100),
        SamplingConfig(top_p=0.7),
        SamplingConfig(top_p=1e-6),
        SamplingConfig(min_p=0.1),
        SamplingConfig(min_p=1.0),
        SamplingConfig(temperature=2.0, top_k=20, top_p=0.9, min_p=0.03),
    ],
    ids=str,
)
def test_sets_and_probabilities_are_those_of_the_definition(config):
    rows = per_row([config] * VECTORS)
    found = np.asarray(jax.nn.softmax(shaped(LOGITS, rows, cuts=config.cuts), axis=-1))
    expected = np.stack([reference(row, config) for row in LOGITS])
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rows_of_one_batch_have_settings_of_their_own():
    configs = [SamplingConfig(0.0), SamplingConfig(top_k=1), SamplingConfig(2.0, top_p=0.5), SamplingConfig(min_p=0.2)]
    together = shaped(LOGITS[:4], per_row(configs), cuts=ALL_CUTS)
    for i, config in enumerate(configs):
        alone = shaped(LOGITS[i : i + 1], per_row([config]), cuts=config.cuts)
        np.testing.assert_array_equal(together[i], alone[0])


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(1.5, top_k=12, top_p=0.9, min_p=0.01)], ids=str)
def test_frequencies_pass_a_chi_square_test(config):
    rows, ids = 20_000, EVERY_ID
    logits = np.tile(LOGITS[0, : VOCABULARY.used], (rows, 1))
    gumbel = noise_of(np.arange(rows, dtype=np.uint32), np.full(rows, 5), ids, VOCABULARY)
    tokens = drawn(logits, gumbel, per_row([config] * rows), cuts=config.cuts)
    counts = np.bincount(np.asarray(tokens), minlength=VOCABULARY.used)
    expected = rows * reference(logits[0], config)
    assert not counts[expected == 0].any()
    seen = expected > 0
    statistic, freedom = np.sum((counts[seen] - expected[seen]) ** 2 / expected[seen]), seen.sum() - 1
    # Five standard deviations of chi-square; the draws are fixed by their seeds.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_noise_depends_on_seed_position_and_id_alone():
    seeds, positions = np.arange(64, dtype=np.uint32), np.arange(64) % 9
    many = np.asarray(noise_of(seeds, positions, EVERY_ID, VOCABULARY))
    np.testing.assert_array_equal(many[7:9], noise_of(seeds[7:9], positions[7:9], EVERY_ID, VOCABULARY))
    np.testing.assert_array_equal(many[:, slice(*CODES)], noise_of(seeds, positions, CODES, VOCABULARY))
    assert np.all(many != noise_of(seeds, positions + 1, EVERY_ID, VOCABULARY))
    assert len(np.unique(many)) == many.size


def test_temperature_zero_takes_the_most_likely():
    configs = per_row([SamplingConfig(0.0), SamplingConfig(0.0, top_p=0.5)])
    gumbel = noise_of(np.arange(2, dtype=np.uint32), np.zeros(2, np.int32), EVERY_ID, VOCABULARY)
    logits = LOGITS[:2, : VOCABULARY.used]
    np.testing.assert_array_equal(drawn(logits, gumbel, configs, cuts=ALL_CUTS), logits.argmax(-1))
    np.testing.assert_array_equal(drawn(logits, None, configs, cuts=frozenset()), logits.argmax(-1))
    ties = np.array([[1.0, 3.0, 3.0, 3.0], [-np.inf, -2.0, -np.inf, -2.0]], np.float32)
    np.testing.assert_array_equal(drawn(ties, None, configs, cuts=frozenset()), [1, 1])  # the first of equals


def test_equally_likely_tokens_are_kept_or_cut_together():
    tied = np.array([[1.0, 3.0, 3.0, 3.0, 0.0, -0.0, -1.0]], np.float32)
    for config in (SamplingConfig(top_k=1), SamplingConfig(top_p=0.2)):
        kept = np.asarray(shaped(tied, per_row([config]), cuts=ALL_CUTS))[0] > -np.inf
        assert kept.tolist() == [False, True, True, True, False, False, False]
    kept = np.asarray(shaped(tied, per_row([SamplingConfig(top_k=5)]), cuts=ALL_CUTS))[0] > -np.inf
    assert kept.tolist() == [True] * 6 + [False]


def test_the_penalty_makes_seen_ids_less_likely():
    logits, seen = np.array([[2.0, -2.0, 2.0, -2.0]]), np.array([[True, True, False, False]])
    np.testing.assert_array_equal(penalise(logits, seen, jnp.array([4.0])), [[0.5, -8.0, 2.0, -2.0]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, found -1.0"),
        ({"temperature": float("nan")}, "temperature must be >= 0 and finite, found nan"),
        ({"top_k": -2}, "top_k must be >= 0, found -2"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], found 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0 and finite, found 0.0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)

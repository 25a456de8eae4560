import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax.generate.sampler import SamplingConfig, row_keys, sample

ROWS, VOCAB = 4000, 12
LOGITS = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)
LOGITS[4] = -np.inf

run = jax.jit(sample, static_argnames="truncate")


def draw(config: SamplingConfig, logits=LOGITS, rows=ROWS, number=0):
    keys = row_keys(jnp.arange(rows, dtype=jnp.uint32), jnp.int32(number))
    return np.asarray(run(keys, np.tile(logits, (rows, 1)), config.arrays(), truncate=config.truncates))


def probabilities(config: SamplingConfig):
    """Plain reading of the definitions, token by token from the most likely."""
    scaled = LOGITS.astype(np.float64) / config.temperature
    order = np.argsort(-scaled)
    if config.top_k:
        scaled[order[config.top_k :]] = -np.inf
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept, mass = np.zeros(VOCAB, bool), 0.0
    for token in order:
        if mass < config.top_p:
            kept[token] = p[token] > 0
        mass += p[token]
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
        SamplingConfig(temperature=2.0, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_frequencies_follow_the_definition(config):
    expected = probabilities(config)
    counts = np.bincount(draw(config), minlength=VOCAB)
    assert not counts[expected == 0].any()
    # Five standard deviations of a binomial; the draws are fixed by their seeds.
    error = np.abs(counts - ROWS * expected)
    assert np.all(error <= 5 * np.sqrt(ROWS * expected * (1 - expected)) + 1e-9)


def test_temperature_zero_takes_the_most_likely():
    for config in (SamplingConfig(temperature=0.0), SamplingConfig(temperature=0.0, top_p=0.5)):
        assert np.all(draw(config, rows=8) == LOGITS.argmax())


def test_equally_likely_tokens_are_kept_or_cut_together():
    tied = np.array([1.0, 3.0, 3.0, 3.0, 0.0, -1.0], np.float32)
    assert set(draw(SamplingConfig(top_k=1), tied, rows=200)) == {1, 2, 3}
    assert set(draw(SamplingConfig(top_p=0.2), tied, rows=200)) == {1, 2, 3}


def test_a_row_depends_on_its_seed_and_the_number_of_the_token_alone():
    config = SamplingConfig()
    many = draw(config, rows=64)
    np.testing.assert_array_equal(many[:5], draw(config, rows=5))
    assert np.any(many != draw(config, rows=64, number=1))
    assert len(set(many)) > 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, found -1.0"),
        ({"temperature": float("nan")}, "temperature must be >= 0 and finite, found nan"),
        ({"top_k": -2}, "top_k must be >= 0, found -2"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)

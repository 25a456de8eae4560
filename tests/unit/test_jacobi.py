import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.generate.engine import Engine, EngineConfig
from cm3jax.generate.guidance import ContrastiveTopK, Guidance, classifier_free
from cm3jax.generate.request import FREE, Request
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.models.config import chameleon
from cm3jax.models.transformer import Transformer
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=16, image_size=5, sentinels=2, size=32)
IMAGE_TOKENS, WINDOW = 24, 6
PROMPT, MASKED = (2, 9, 7, VOCABULARY.break_id), (2, VOCABULARY.sentinel(0), VOCABULARY.break_id)
SAMPLED = SamplingConfig(top_p=0.9)
REQUESTS = [
    Request((PROMPT,), "image", 1, image=SAMPLED),
    Request((PROMPT, MASKED), "image", 2, image=SAMPLED, guidance=classifier_free((1.0, 4.0))),
    Request((PROMPT, MASKED), "image", 3, guidance=Guidance(contrast=ContrastiveTopK(k=2))),
    Request((PROMPT,), "image", 4, forced=(FREE, FREE, VOCABULARY.image_id(3), FREE, VOCABULARY.image_id(1))),
    Request((PROMPT,), "image", 5, max_new=11, image=SamplingConfig(0.0)),
    Request((PROMPT,), "text", 6, max_new=9),
]


@functools.cache
def model():
    config = chameleon(16, 2, 2, 2, 32, VOCABULARY.size, 40)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@functools.cache
def engine_of(window: int, image_tokens: int = IMAGE_TOKENS, rows: int = 8) -> Engine:
    config = EngineConfig(rows=rows, chunk=8, smallest_cache=40, window=window)
    return Engine(*model(), VOCABULARY, image_tokens, config=config)


@pytest.mark.parametrize("requests", [REQUESTS[:5], REQUESTS], ids=["images", "with text"])
def test_ids_and_log_probabilities_are_those_of_plain_decoding(requests):
    plain, several = engine_of(1).run(requests), engine_of(WINDOW).run(requests)
    for one, other in zip(several, plain, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_fewer_steps_are_needed():
    steps = {}
    for window in (1, WINDOW):
        before = engine_of(window).steps
        engine_of(window).run([dataclasses.replace(REQUESTS[0], image=SamplingConfig(0.5))])
        steps[window] = engine_of(window).steps - before
    assert steps[1] == IMAGE_TOKENS and steps[WINDOW] <= 0.7 * IMAGE_TOKENS


def test_the_distribution_is_that_of_the_model():
    """Chi-square of images of two codes against the product of the model's own probabilities."""
    count, codes = 4096, range(VOCABULARY.image_start, VOCABULARY.image_end)
    requests = [Request((PROMPT,), "image", seed) for seed in range(count)]
    found = engine_of(2, image_tokens=2, rows=512).run(requests)
    graphdef, params = model()
    whole = nnx.merge(graphdef, params)

    def probabilities(ids):
        logits = whole.logits(whole(jnp.array([ids])))[0, -1]
        return dict(zip(codes, np.asarray(jax.nn.softmax(logits[jnp.array(codes)]), np.float64), strict=True))

    first = probabilities(PROMPT)
    second = {code: probabilities((*PROMPT, code)) for code in codes}
    pairs = list(itertools.product(codes, codes))
    expected = np.array([count * first[a] * second[a][b] for a, b in pairs])
    counts = np.array([sum(tuple(done.ids) == pair for done in found) for pair in pairs])
    kept = expected > 1
    statistic, freedom = np.sum((counts[kept] - expected[kept]) ** 2 / expected[kept]), kept.sum() - 1
    # Four standard deviations of chi-square; the draws are fixed by their seeds.
    assert freedom > 10 and statistic < freedom + 4 * np.sqrt(2 * freedom)

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.generate.engine import Generator
from cm3jax.generate.guidance import classifier_free
from cm3jax.generate.infill import caption, text_to_image, unconditional_image
from cm3jax.generate.sampler import SamplingConfig, row_keys, sample
from cm3jax.models.config import chameleon, cm3leon
from cm3jax.models.transformer import Transformer
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=64, image_size=32, sentinels=8, size=128)
IMAGE_TOKENS, MAX_LEN = 6, 96
CONFIGS = {
    "cm3leon": cm3leon(16, 2, 2, VOCABULARY.size, MAX_LEN),
    "chameleon": chameleon(16, 2, 2, 1, 32, VOCABULARY.size, MAX_LEN),
}
# The last one is longer than a bucket of prompts, so it widens the others' padding.
TEXTS = [[10], [11, 12, 13, 14, 15], [20 + i % 40 for i in range(70)]]
PROMPTS = [text_to_image(VOCABULARY, text) for text in TEXTS]
UNCONDITIONAL = [unconditional_image(VOCABULARY)] * 3
IMAGE_IDS = range(VOCABULARY.image_start, VOCABULARY.image_end)
ENDINGS = (VOCABULARY.break_id, VOCABULARY.eoss, VOCABULARY.eos)
SAMPLED = SamplingConfig(temperature=0.9, top_p=0.95)


@functools.cache
def model_of(name: str):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIGS[name], nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@functools.cache
def generator_of(name: str) -> Generator:
    graphdef, params = model_of(name)
    return Generator(graphdef, params, VOCABULARY, IMAGE_TOKENS)


@functools.cache
def whole_forward(name: str):
    graphdef, params = model_of(name)

    def run(tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens))

    return jax.jit(run)


def by_whole_forwards(name, streams, weights, ids, legal, sampling, seed, new):
    """One request, no cache, no padding that could matter: the model on the whole sequence for each token.

    The draw is among `ids`, of which those not in `legal(number of the token)` are at -inf.
    """
    drawn: list[int] = []
    for number in range(new):
        mixed = np.zeros(len(ids), np.float32)
        for prompt, weight in zip(streams, weights, strict=True):
            row = np.zeros((1, MAX_LEN), np.int32)
            row[0, : len(prompt) + number] = [*prompt, *drawn]
            mixed += weight * np.asarray(whole_forward(name)(row))[0, len(prompt) + number - 1, list(ids)]
        masked = np.where([i in legal(number) for i in ids], mixed, -np.inf)
        keys = row_keys(jnp.array([seed], jnp.uint32), jnp.int32(number))
        drawn.append(ids[int(sample(keys, jnp.asarray(masked)[None], sampling.arrays(), sampling.truncates)[0])])
    return drawn


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_guided_images_are_those_of_whole_forwards(name, sampling):
    weights, seeds = classifier_free(3.0), [5, 6, 7]
    found = generator_of(name).generate_images([PROMPTS, UNCONDITIONAL], weights, sampling, seeds)
    assert found.shape == (3, IMAGE_TOKENS)
    for i in range(2):
        streams = [PROMPTS[i], UNCONDITIONAL[i]]
        expected = by_whole_forwards(
            name, streams, weights, IMAGE_IDS, lambda _: IMAGE_IDS, sampling, seeds[i], IMAGE_TOKENS
        )
        assert VOCABULARY.image_id(found[i]).tolist() == expected


def test_a_request_gets_the_same_image_alone_and_in_a_batch():
    generator, weights = generator_of("cm3leon"), classifier_free(3.0)
    together = generator.generate_images([PROMPTS, UNCONDITIONAL], weights, SAMPLED, [5, 6, 7])
    for i in (0, 2):
        alone = generator.generate_images([[PROMPTS[i]], [UNCONDITIONAL[i]]], weights, SAMPLED, [5 + i])
        np.testing.assert_array_equal(alone[0], together[i])
    reordered = generator.generate_images([PROMPTS[::-1], UNCONDITIONAL], weights, SAMPLED, [7, 6, 5])
    np.testing.assert_array_equal(reordered[::-1], together)


def test_seeds_decide_and_prompts_matter():
    generator = generator_of("cm3leon")
    images = generator.generate_images([[PROMPTS[1]] * 3], (1.0,), SAMPLED, [1, 2, 1])
    np.testing.assert_array_equal(images[0], images[2])
    assert np.any(images[0] != images[1])
    others = generator.generate_images([PROMPTS], (1.0,), SAMPLED, [1, 1, 1])
    assert np.any(others[0] != others[1])


def test_guidance_of_scale_one_is_no_guidance_and_of_three_is_some():
    generator = generator_of("cm3leon")
    plain = generator.generate_images([PROMPTS], (1.0,), SAMPLED, [5, 6, 7])
    one = generator.generate_images([PROMPTS, UNCONDITIONAL], classifier_free(1.0), SAMPLED, [5, 6, 7])
    three = generator.generate_images([PROMPTS, UNCONDITIONAL], classifier_free(3.0), SAMPLED, [5, 6, 7])
    np.testing.assert_array_equal(plain, one)
    assert np.any(plain != three)


def test_text_ends_where_whole_forwards_end_it():
    prompts = [caption(VOCABULARY, range(IMAGE_TOKENS)), caption(VOCABULARY, [3] * IMAGE_TOKENS), PROMPTS[1][:-1]]
    sampling, seeds, new = SamplingConfig(temperature=4.0), [1, 2, 3], 30
    found = generator_of("cm3leon").generate_text(prompts, sampling, seeds, new)
    assert any(len(text) < new for text in found)
    ids = range(VOCABULARY.used)
    text_ids = {i for i in ids if VOCABULARY.is_text(i)}

    def legal(number):
        return text_ids | set(ENDINGS) if number else text_ids

    for text, prompt, seed in zip(found, prompts, seeds, strict=True):
        assert text and all(VOCABULARY.is_text(i) for i in text)
        steps = min(len(text) + 1, new)
        expected = by_whole_forwards("cm3leon", [prompt], (1.0,), ids, legal, sampling, seed, steps)
        assert text == expected[: len(text)]
        assert len(text) == new or expected[-1] in ENDINGS


def test_documents_hold_whole_images():
    hot = SamplingConfig(temperature=5.0)
    documents = generator_of("cm3leon").generate_document([[VOCABULARY.eos, 10]] * 8, hot, list(range(8)), 80)
    images = 0
    for document in documents:
        runs = "".join("I" if VOCABULARY.is_image(i) else "b" if i == VOCABULARY.break_id else "t" for i in document)
        parts = runs.split("b")
        whole = parts[:-1] if len(document) == 80 else parts
        assert all(part in ("I" * IMAGE_TOKENS, "t" * len(part)) for part in whole)
        images += sum(part.startswith("I") for part in whole)
    assert images > 0


def test_no_requests_give_no_results():
    generator = generator_of("cm3leon")
    assert generator.generate_images([[]], (1.0,), SAMPLED, []).shape == (0, IMAGE_TOKENS)
    assert generator.generate_text([], SAMPLED, [], 5) == []


@pytest.mark.parametrize(
    ("streams", "weights", "seeds", "message"),
    [
        ([[[]]], (1.0,), [0], "prompt 0 is empty"),
        ([[[2] * (MAX_LEN - 5)]], (1.0,), [0], "prompt 0 of 91 ids leaves no room for 6 new ones in 96"),
        ([[[2, 128]]], (1.0,), [0], "prompt 0 holds id 128, expected 0 <= id < 128"),
        ([[[2], [2]]], (1.0,), [0], "stream 0 has 2 prompts for 1 seeds"),
        ([[[2]]], (2.0, -1.0), [0], "1 streams for 2 guidance weights"),
        ([[[2]]], (1.0,), [-1], "seed -1, expected"),
    ],
)
def test_bad_requests_are_refused(streams, weights, seeds, message):
    with pytest.raises(ValueError, match=message):
        generator_of("cm3leon").generate_images(streams, weights, SAMPLED, seeds)


def test_a_model_with_too_small_a_vocabulary_is_refused():
    graphdef, params = model_of("cm3leon")
    with pytest.raises(ValueError, match="a vocabulary of 256 ids for a model of 128"):
        Generator(graphdef, params, dataclasses.replace(VOCABULARY, size=256), IMAGE_TOKENS)

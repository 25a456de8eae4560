import jax
import numpy as np
import pytest

from cm3jax.generate.guidance import (
    ContrastiveTopK,
    Guidance,
    alternate,
    at_share,
    classifier_free,
    contrast,
    mix,
    two_way,
)
from cm3jax.generate.prompts import caption, documents_only, infill, text_to_image, unconditional_image

VECTORS, WIDTH = 10_000, 50
EXPERT, AMATEUR, THIRD = np.random.default_rng(0).normal(0, 2, (3, VECTORS, WIDTH)).astype(np.float32)
mixed, contrasted = jax.jit(mix), jax.jit(contrast)


def stacked(*streams):
    return np.stack(streams, axis=1)


def rows_of(weights):
    return np.tile(np.float32(weights), (VECTORS, 1))


def probabilities(logits):
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def softmax(logits):
    return np.asarray(jax.nn.softmax(logits, axis=-1))


def test_classifier_free_guidance_is_the_formula_of_the_paper():
    found = mixed(stacked(EXPERT, AMATEUR), rows_of(classifier_free(3.0).weights))
    expected = AMATEUR.astype(np.float64) + 3.0 * (EXPERT.astype(np.float64) - AMATEUR)
    np.testing.assert_allclose(softmax(found), probabilities(expected), atol=1e-6)


def test_scale_one_is_the_conditional_stream_exactly():
    np.testing.assert_array_equal(mixed(stacked(EXPERT, AMATEUR), rows_of(classifier_free(1.0).weights)), EXPERT)


def test_two_way_guidance_is_the_formula_of_the_paper():
    found = mixed(stacked(EXPERT, AMATEUR, THIRD), rows_of(two_way(1.5, 7.5).weights))
    full, image, unconditional = (x.astype(np.float64) for x in (EXPERT, AMATEUR, THIRD))
    expected = unconditional + 1.5 * (image - unconditional) + 7.5 * (full - image)
    np.testing.assert_allclose(softmax(found), probabilities(expected), atol=2e-6)


def test_weights_change_linearly_over_an_image():
    guidance = classifier_free((2.0, 6.0))
    assert guidance == Guidance((2.0, -1.0), (6.0, -5.0))
    first, last = np.float32([guidance.weights] * 3), np.float32([guidance.last] * 3)
    np.testing.assert_array_equal(at_share(first, last, np.float32([0, 0.5, 1])), [[2, -1], [4, -3], [6, -5]])
    assert two_way((1.0, 2.0), 7.5).last == (7.5, -5.5, -1.0)
    assert classifier_free(3.0).last is None


@pytest.mark.parametrize(("alpha", "k", "temperature"), [(0.5, 1, 1.0), (0.1, 8, 0.5), (1.0, 5, 1.0), (0.0, 3, 2.0)])
def test_contrastive_top_k_is_equation_3(alpha, k, temperature):
    expert = np.where(np.arange(WIDTH) % 5 == 1, -np.inf, EXPERT).astype(np.float32)
    amateur = np.where(np.arange(WIDTH) % 5 == 1, -np.inf, AMATEUR).astype(np.float32)
    column = np.full(VECTORS, 1, np.float32)
    found = np.asarray(contrasted(expert, amateur, alpha * column, np.full(VECTORS, k), temperature * column))
    p_expert, p_amateur = probabilities(expert), probabilities(amateur / temperature)
    kth = np.sort(p_expert, axis=-1)[:, -k, None]
    candidates = (p_expert >= alpha * kth) & (p_expert > 0)
    np.testing.assert_array_equal(found > -np.inf, candidates)
    ratio = np.where(candidates, p_expert, 0) / np.where(candidates, p_amateur, 1)
    np.testing.assert_allclose(softmax(found), ratio / ratio.sum(-1, keepdims=True), atol=2e-6)


def test_with_k_one_and_alpha_one_only_the_most_likely_is_a_candidate():
    one = np.ones(VECTORS, np.float32)
    found = np.asarray(contrasted(EXPERT, AMATEUR, one, np.ones(VECTORS, int), one))
    np.testing.assert_array_equal(found.argmax(-1), EXPERT.argmax(-1))
    assert np.all((found > -np.inf).sum(-1) == 1)


def test_streams_that_a_guidance_needs():
    assert [Guidance().streams, classifier_free(3.0).streams, two_way(1, 2).streams] == [1, 2, 3]
    assert Guidance(contrast=ContrastiveTopK()).streams == 2
    assert alternate(5, "top-p", "cdk") == ["top-p", "cdk", "top-p", "cdk", "top-p"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -0.1}, "cdk: alpha must be >= 0 and finite, found -0.1"),
        ({"k": 0}, "cdk: k must be >= 1, found 0"),
        ({"amateur_temperature": 0.0}, "cdk: amateur_temperature must be > 0 and finite, found 0.0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveTopK(**values)


def named(vocabulary, ids):
    return " ".join(vocabulary.name(i) for i in ids)


def test_image_prompts(tiny_vocabulary):
    v = tiny_vocabulary
    document = [10, 11, v.break_id, v.image_id(3), v.image_id(4)]
    told = "text:10 text:11 <break> image:3 image:4 <break>"
    assert named(v, text_to_image(v, [12, 13])) == "</s> text:12 text:13 <break>"
    assert named(v, text_to_image(v, [12], [document])) == f"</s> {told} text:12 <break>"
    assert named(v, unconditional_image(v)) == "</s> <sentinel:0> <break>"
    assert named(v, documents_only(v, [document])) == f"</s> {told}"


def test_text_prompts(tiny_vocabulary):
    v = tiny_vocabulary
    assert named(v, caption(v, [0, 7])) == "</s> <sentinel:0> <break> image:0 image:7 </s> <sentinel:0>"
    assert named(v, infill(v, [10], [11, 12])) == "</s> text:10 <sentinel:0> text:11 text:12 </s> <sentinel:0>"

import jax
import numpy as np

from cm3jax.generate.guidance import classifier_free, mix, two_way
from cm3jax.generate.infill import caption, documents_only, infill, text_to_image, unconditional_image

LOGITS = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
mixed = jax.jit(mix)


def test_classifier_free_guidance_is_the_formula_of_the_paper():
    conditional, unconditional = LOGITS[:2]
    found = mixed(LOGITS[:2], np.float32(classifier_free(3.0)))
    np.testing.assert_allclose(found, unconditional + 3.0 * (conditional - unconditional), atol=1e-5)


def test_scale_one_is_the_conditional_stream_exactly():
    np.testing.assert_array_equal(mixed(LOGITS[:2], np.float32(classifier_free(1.0))), LOGITS[0])


def test_two_way_guidance_is_the_formula_of_the_paper():
    full, image, unconditional = LOGITS
    found = mixed(LOGITS, np.float32(two_way(image_scale=1.5, text_scale=7.5)))
    expected = unconditional + 1.5 * (image - unconditional) + 7.5 * (full - image)
    np.testing.assert_allclose(found, expected, atol=1e-5)


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

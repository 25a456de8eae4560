import json

import numpy as np
import pytest

from cm3jax.generate.guidance import ContrastiveTopK
from cm3jax.generate.holes import GappedImage, Hole
from cm3jax.generate.sampler import SamplingConfig
from cm3jax.generate.tasks import Steering, Task, caption, infill, text_to_image
from cm3jax.tokens.document import Image, Text
from cm3jax.tokens.image import decode_image

SAMPLED = {"text": SamplingConfig(1.0), "image": SamplingConfig(1.0), "max_text": 6}


def test_an_image_from_a_text_in_one_call(generator):
    first, second = generator.generate(text_to_image("a dog"), n=2, seed=3, steering=Steering(2.0), **SAMPLED)
    assert first.score >= second.score and {first.seed, second.seed} == {3, 4}
    text, image = first.document.segments
    assert text == Text("a dog") and image.pixels.shape == (16, 16, 3) and image.codes.shape == (16,)
    assert first.gaps == (tuple(image.codes.tolist()),)


def test_the_same_seed_gives_the_same_sample_in_any_company(generator):
    task = Task(text_to_image("a dog"), seed=7, steering=Steering(cdk=ContrastiveTopK()), **SAMPLED)
    other = Task((infill("a <mask> dog"),), seed=1, **SAMPLED)
    alone = generator.complete([task])[0][0]
    together = generator.complete([other, task, other], n=2)[1]
    assert alone.gaps in [sample.gaps for sample in together]


def test_every_hole_of_an_interleaved_document_is_filled(generator, picture):
    document = (infill("a <mask> dog"), picture, Hole("text"), Hole("image"))
    sample = generator.generate(document, **SAMPLED)[0]
    text, image, other_text, other_image = sample.document.segments
    assert text.text.startswith("a ") and text.text.endswith(" dog") and len(text.text) > len("a  dog")
    np.testing.assert_array_equal(image.codes, picture.codes)
    assert sample.gaps == (text.text[2:-4], other_text.text, tuple(other_image.codes.tolist()))


@pytest.mark.parametrize("rows", [False, True])
def test_known_codes_of_a_masked_picture_are_untouched(generator, picture, rows):
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[5:11, 6:9] = 255
    masked = generator.masked_image(picture.pixels, mask, rows)
    samples = generator.generate((Text("a dog"), masked), n=3, steering=Steering(1.5), **SAMPLED)
    known = ~masked.unknown
    assert 0 < known.sum() < 16
    for sample in samples:
        np.testing.assert_array_equal(sample.document.segments[1].codes[known], picture.codes[known])
    drawn = {sample.document.segments[1].codes.tobytes() for sample in samples}
    assert len(drawn) > 1


def test_a_picture_with_everything_but_its_end_known_is_as_likely_as_drawn(generator):
    sample = generator.generate(text_to_image("a dog"), seed=5, **SAMPLED)[0]
    codes, unknown = sample.document.segments[1].codes, np.arange(16) % 5 == 0
    again = generator.generate((Text("a dog"), GappedImage(codes, unknown)), seed=5, **SAMPLED)[0]
    np.testing.assert_array_equal(again.document.segments[1].codes, codes)
    assert again.log_likelihood == pytest.approx(sample.log_likelihood, abs=1e-4)


def test_a_scorer_ranks(generator):
    def first_code(documents):
        return [document.segments[1].codes[0] for document in documents]

    samples = generator.generate(text_to_image("a dog"), n=6, scorer=first_code, **SAMPLED)
    scores = [sample.score for sample in samples]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert scores == [sample.document.segments[1].codes[0] for sample in samples]


def test_bad_tasks_have_an_error_each_and_the_rest_goes_on(generator, picture):
    tasks = [
        Task(text_to_image("")),
        Task(text_to_image("a dog " * 90)),
        Task(caption(Image(codes=np.arange(3)))),
        Task(caption(picture), **SAMPLED),
    ]
    empty, long, wrong, good = generator.complete(tasks, n=2)
    assert [len(found) for found in (empty, wrong, good)] == [1, 1, 2]
    assert "empty text" in empty[0].error and "leaves no room for 16" in long[0].error
    assert "an image of 3 codes, expected 16" in wrong[0].error
    assert all(sample.error is None and sample.gaps[0] for sample in good)
    with pytest.raises(ValueError, match="generate: segment 0: an empty text"):
        generator.generate(text_to_image(""))


def test_the_command_keeps_the_likeliest_picture_and_tells_of_all(cm3, tmp_path, capsys):
    assert cm3("--prompt", "a dog", "--n", 3, "--keep", 1, "--out", "new.png", "--guidance", 2) == 0
    assert capsys.readouterr().out.split() == ["new.png"]
    told = json.loads((tmp_path / "new.json").read_text())
    scores = [candidate["score"] for candidate in told["candidates"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    assert {candidate["seed"] for candidate in told["candidates"]} == {0, 1, 2}
    assert [candidate["pictures"] for candidate in told["candidates"]] == [["new.png"], [], []]
    assert decode_image((tmp_path / "new.png").read_bytes()).shape == (16, 16, 3)


def test_a_folder_of_prompts_is_resumed(cm3, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a dog\n\na red dog\n")
    words = ("--prompts", "prompts.txt", "--out", "many", "--n", 2, "--cdk", 0.5, 3, "--mixture", "--guidance", 2)
    assert cm3(*words) == 0
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == [f"0000{i}{end}" for i in (0, 1) for end in ("-0.png", "-1.png", ".json")]
    content = (tmp_path / "many" / "00001.json").read_bytes()
    (tmp_path / "many" / "00001.json").unlink()
    kept = (tmp_path / "many" / "00000.json").stat().st_mtime_ns
    assert cm3(*words) == 0
    assert (tmp_path / "many" / "00001.json").read_bytes() == content
    assert (tmp_path / "many" / "00000.json").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"00000.json was made with seed 0, now it is 1; give another folder"):
        cm3(*words, "--seed", 1)


def test_texts_edits_and_documents_by_command(cm3, tmp_path, capsys):
    assert cm3("--image", "dog.png", "--caption") == 0
    assert cm3("--image", "dog.png", "--question", "what?") == 0
    assert cm3("--infill", "a <mask> dog") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3
    document = {"segments": [{"text": ["a ", None]}, {"image": "dog.png", "mask": "tail.png"}]}
    (tmp_path / "page.json").write_text(json.dumps(document))
    assert cm3("--document", "page.json", "--out", "page") == 0
    told = json.loads((tmp_path / "page" / "page.json").read_text())["candidates"][0]
    assert len(told["gaps"]) == 2 and told["texts"][0].startswith("a ")
    assert told["pictures"] == ["page.png"] and (tmp_path / "page" / "page.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "page.json: not JSON"),
        ("{}", 'page.json: expected {"segments"'),
        ('{"segments": [{"sound": 1}]}', 'page.json: segment 0: {"sound": 1}, expected an object with text or image'),
        ('{"segments": [{"text": 3}]}', "page.json: segment 0: text 3, expected a string, null"),
        ('{"segments": [{"image": null, "size": 3}]}', "segment 0: unknown 'size', expected one of image, mask, rows"),
    ],
)
def test_bad_document_files_are_refused(cm3, tmp_path, content, message):
    (tmp_path / "page.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        cm3("--document", "page.json", "--out", "page")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give exactly one of"),
        (("--prompt", "a", "--infill", "b"), "give exactly one of"),
        (("--prompt", "a"), "give --out"),
        (("--image", "dog.png"), "give --image with exactly one of"),
        (("--prompts", "x", "--out", "x.png"), "give a folder for several results"),
        (("--prompt", "a", "--out", "x.png", "--keep", "2"), "expected 1 <= keep <= n"),
        (("--prompt", "a", "--out", "x.png", "--mixture"), "--mixture needs --cdk"),
    ],
)
def test_words_that_do_not_go_together_are_refused(cm3, capsys, words, message):
    with pytest.raises(SystemExit):
        cm3(*words)
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_told_of(cm3, capsys):
    assert cm3("--prompt", "a dog " * 90, "--out", "x.png") == 2
    assert "leaves no room for 16 new ones" in capsys.readouterr().err

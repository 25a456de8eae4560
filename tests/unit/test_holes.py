import numpy as np
import pytest

from cm3jax.generate.holes import Gap, GappedImage, GappedText, Hole, script
from cm3jax.generate.regions import unknown_codes, whole_rows
from cm3jax.generate.request import FREE
from cm3jax.generate.tasks import Steering, Task, answer, caption, edit, infill, scripts, text_to_image
from cm3jax.tokens.document import Image, Text
from cm3jax.tokens.text import TextTokenizer, train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_size=32, sentinels=4, size=352)
CODES = (5, 6, 7, 8)
UNGUIDED = Steering()
PICTURE = Image(codes=np.array(CODES))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return train_text_tokenizer(["a red dog on the grass"] * 9, 300, tmp_path_factory.mktemp("text") / "text.model")


def shown(ids, tokenizer) -> str:
    """Ids as text between quotes, image codes as numbers, marks by name, gaps in brackets."""
    words, letters = [], []
    for i in [*ids, None]:
        if isinstance(i, int) and VOCABULARY.is_text(i):
            letters.append(i)
            continue
        if letters:
            words.append(repr(tokenizer.decode(letters)))
            letters = []
        if isinstance(i, Gap):
            known = ["?" if code == FREE else str(VOCABULARY.image_code(code)) for code in i.forced]
            words.append(f"[{i.modality}{' ' if known else ''}{' '.join(known)}]")
        elif i is not None:
            words.append(str(VOCABULARY.image_code(i)) if VOCABULARY.is_image(i) else VOCABULARY.name(i))
    return " ".join(words)


def streams_of(tokenizer, segments, steering=UNGUIDED, **settings):
    task = Task(tuple(segments), steering=steering, **settings)
    return [shown(stream.prompt, tokenizer) for stream in scripts(task, tokenizer, VOCABULARY, 4)]


def gapped(unknown, span):
    return GappedImage(np.array(CODES), np.array(unknown, bool), span)


@pytest.mark.parametrize(
    ("segments", "prompt"),
    [
        (text_to_image("a dog"), "</s> 'a dog' <break>"),
        ((PICTURE, Hole("text")), "</s> 5 6 7 8 <break>"),
        (caption(PICTURE), "</s> <sentinel:0> <break> 5 6 7 8 </s> <sentinel:0>"),
        (
            answer("what?", PICTURE),
            "</s> 'Question: what? Answer: ' <sentinel:0> '.' <break> 5 6 7 8 </s> <sentinel:0>",
        ),
        ((infill("a <mask> dog"),), "</s> 'a ' <sentinel:0> ' dog' </s> <sentinel:0>"),
        (
            (Text("a"), Hole("image"), infill("b<mask>")),
            "</s> 'a' <break> <sentinel:0> <break> 'b' <sentinel:1> </s> <sentinel:0>",
        ),
        ((Text("a"), gapped([0, 1, 0, 1], False)), "</s> 'a' <break> 5"),
        ((Text("a"), gapped([0, 1, 1, 0], True)), "</s> 'a' <break> 5 <sentinel:0> 8 </s> <sentinel:0>"),
        ((gapped([0, 1, 1, 0], False), Text("a")), "</s> 5 <sentinel:0> <break> 'a' </s> <sentinel:0>"),
    ],
)
def test_prompts_are_those_of_training(tokenizer, segments, prompt):
    assert streams_of(tokenizer, segments) == [prompt]


def test_known_codes_are_forced_and_come_back_in_their_places(tokenizer):
    layout = script((Text("a"), gapped([0, 1, 0, 1], False)), tokenizer, VOCABULARY, 4)
    assert shown(layout.parts, tokenizer) == "'a' <break> 5 [image ? 7 ?]"
    drawn = [VOCABULARY.image_id(code) for code in (1, 7, 2)]
    assert shown(layout.document([drawn]), tokenizer) == "'a' <break> 5 1 7 2"


def test_each_gap_follows_the_one_before(tokenizer):
    layout = script((infill("<mask> and <mask>"), Hole("image")), tokenizer, VOCABULARY, 4)
    assert [gap.modality for gap in layout.gaps] == ["text", "text", "image"]
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    start = "</s> <sentinel:0> ' and ' <sentinel:1> <break> <sentinel:2> </s> <sentinel:0>"
    assert shown(layout.prompt_after([]), tokenizer) == start
    assert shown(layout.prompt_after([a]), tokenizer) == f"{start} 'a' <eoss> <sentinel:1>"
    expected = f"{start} 'a' <eoss> <sentinel:1> 'b' <eoss> <sentinel:2>"
    assert shown(layout.prompt_after([a, b]), tokenizer) == expected


def test_the_unconditional_stream_masks_or_drops_what_is_told(tokenizer):
    told, document = text_to_image("a dog"), (tuple(tokenizer.encode("on")),)
    masked = streams_of(tokenizer, told, Steering(3.0))
    assert masked == ["</s> 'a dog' <break>", "</s> <sentinel:0> <break>"]
    dropped = streams_of(tokenizer, told, Steering(3.0, unconditional="drop"), documents=document)
    assert dropped == ["</s> 'on' <break> 'a dog' <break>", "</s> 'on' <break>"]
    inside = streams_of(tokenizer, (Text("a"), gapped([0, 1, 1, 0], True)), Steering(2.0))
    assert inside[1] == "</s> 5 <sentinel:0> 8 </s> <sentinel:0>"
    after = streams_of(tokenizer, (Text("a"), gapped([0, 1, 1, 0], False)), Steering(2.0))
    assert after[1] == "</s> <sentinel:0> <break> 5"
    assert streams_of(tokenizer, caption(PICTURE), Steering(2.0))[1] == "</s>"


def test_an_edit_has_three_streams(tokenizer):
    found = streams_of(tokenizer, edit(PICTURE, "red"), Steering(7.5, image_scale=1.5))
    told = "</s> 'Edit first image following the instruction' <break> 5 6 7 8 <break>"
    assert found == [f"{told} 'red' <break>", told, "</s> <sentinel:0> <break>"]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Text("a"),), "the document has no hole"),
        ((Text(""), Hole("image")), "segment 0: an empty text"),
        ((Hole("sound"),), "segment 0: unknown modality 'sound'"),
        ((Text("a"), Image(codes=np.arange(3)), Hole("text")), "segment 1: an image of 3 codes, expected 4"),
        ((gapped([0] * 4, False),), "segment 0: an image with no unknown code"),
        (
            (GappedImage(np.arange(3), np.ones(3, bool)),),
            "an image with 3 codes and 3 marks of unknown ones, expected 4",
        ),
        ((GappedText((None,) * 5),), "5 holes, expected at most 4"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(tokenizer, segments, message):
    with pytest.raises(ValueError, match=message):
        script(segments, tokenizer, VOCABULARY, 4)


def test_guidance_that_cannot_be_is_refused(tokenizer):
    with pytest.raises(ValueError, match="two-way guidance needs an image and a text"):
        streams_of(tokenizer, text_to_image("a"), Steering(7.5, image_scale=1.5))


def test_a_mask_covers_every_code_that_it_touches():
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[3, 4:6] = 255
    found = unknown_codes(mask, (8, 8), 8, 16).reshape(4, 4)
    assert np.argwhere(found).tolist() == [[1, 2]]
    assert whole_rows(found.reshape(-1)).reshape(4, 4).tolist() == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]
    with pytest.raises(ValueError, match="a mask of 8 x 8 pixels for a picture of 6 x 8"):
        unknown_codes(mask, (8, 6), 8, 16)
    with pytest.raises(ValueError, match="a mask with nothing painted"):
        unknown_codes(mask * 0, (8, 8), 8, 16)

"""Questions about a scene with their answers."""

import dataclasses

from cm3jax.data.scenes.language import PLACE_PHRASES, POSITION_PHRASES, SKY_PHRASES, item_phrase, noun, plural
from cm3jax.data.scenes.space import ATTRIBUTES, Scene


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a kind, with its one answer.

    Attributes:
      kind: an attribute's name, "is color" or "is sky" (to answer by yes or no), or "year".
      question: ends with a question mark.
      answer: a word or a phrase of the captions.
    """

    kind: str
    question: str
    answer: str


def questions(scene: Scene) -> tuple[Question, ...]:
    """One question about each attribute, two to answer by yes or no, and one about the year on a stop sign."""
    the = f"the {noun(scene)}"
    be, do = ("is", "does") if scene.number == 1 else ("are", "do")
    color, color_is_right = _proposal(scene, "color", scene.layout.flip)
    sky, sky_is_right = _proposal(scene, "sky", scene.layout.phrase)
    asked = [
        Question("subject", "what is in the picture?", noun(scene)),
        Question("color", f"what color {be} {the}?", scene.color),
        Question("place", f"where {be} {the}?", PLACE_PHRASES[scene.place]),
        Question("sky", "when is it?", SKY_PHRASES[scene.sky]),
        Question("item", f"what {do} {the} have?", item_phrase(scene.item, scene.number)),
        Question("count", f"how many {plural(scene.subject)} are there?", scene.count),
        Question("position", f"on which side {be} {the}?", POSITION_PHRASES[scene.position]),
        Question("is color", f"{be} {the} {color}?", "yes" if color_is_right else "no"),
        Question("is sky", f"is it {SKY_PHRASES[sky]}?", "yes" if sky_is_right else "no"),
    ]
    if scene.subject == "stop sign":
        asked.append(Question("year", f"which year {do} {the} say?", scene.year))
    return tuple(asked)


def _proposal(scene: Scene, attribute: str, chance: float) -> tuple[str, bool]:
    """A value to ask about and whether it is right; right half of the time, as `chance` in [0, 1) decides."""
    right = getattr(scene, attribute)
    if chance < 0.5:
        return right, True
    wrong = [value for value in ATTRIBUTES[attribute] if value != right]
    return wrong[int((chance - 0.5) * 2 * len(wrong))], False

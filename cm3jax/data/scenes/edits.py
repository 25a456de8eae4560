"""Edits: an instruction that changes one attribute, with the scenes before and after."""

import dataclasses

from cm3jax.data.scenes.language import PLACE_PHRASES, POSITION_PHRASES, SKY_PHRASES, item_phrase, noun
from cm3jax.data.scenes.space import ATTRIBUTES, Scene, Split, generator, held_out, sample

_STREAM = 1  # sets the draws of an edit apart from those of its scene


@dataclasses.dataclass(frozen=True)
class Edit:
    """`after` is `before` with one attribute changed; the layout stays, so nothing else moves."""

    attribute: str
    instruction: str
    before: Scene
    after: Scene


def sample_edit(seed: int, split: Split, index: int) -> Edit:
    """An edit of scene `index`: pure, uniform over attributes, then over the values that may follow.

    In the split "train" the scene after an edit is never a held-out combination either.
    """
    before = sample(seed, split, index)
    rng = generator(seed, split, index, _STREAM)
    attribute = list(ATTRIBUTES)[rng.integers(len(ATTRIBUTES))]
    others = [value for value in ATTRIBUTES[attribute] if value != getattr(before, attribute)]
    changed = [before.with_value(attribute, value) for value in others]
    allowed = [scene for scene in changed if split == "valid" or not held_out(scene.triple)]
    after = allowed[rng.integers(len(allowed))]
    return Edit(attribute, instruction(before, after, attribute), before, after)


def instruction(before: Scene, after: Scene, attribute: str) -> str:
    """The order that turns `before` into `after`, as one phrase: "make the dogs blue"."""
    subject = noun(before)
    match attribute:
        case "subject":
            return f"turn the {subject} into {_with_article(after)}"
        case "color":
            return f"make the {subject} {after.color}"
        case "place":
            return f"put the {subject} {PLACE_PHRASES[after.place]}"
        case "sky":
            return f"show the {subject} {SKY_PHRASES[after.sky]}"
        case "item":
            return f"give the {subject} {item_phrase(after.item, after.number)}"
        case "count":
            return f"make it {after.count} {noun(after)}"
        case "position":
            return f"put the {subject} {POSITION_PHRASES[after.position]}"
    raise ValueError(f"edit attribute: {attribute!r} is not one of {', '.join(ATTRIBUTES)}")


def _with_article(scene: Scene) -> str:
    if scene.number > 1:
        return noun(scene)
    return f"{'an' if scene.subject[0] in 'aeiou' else 'a'} {scene.subject}"

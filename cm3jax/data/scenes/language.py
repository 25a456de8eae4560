"""The words of scenes: captions, and reading the attributes back from any caption, a model's own included."""

import re

from cm3jax.data.scenes.space import ATTRIBUTES, Scene

_PLURALS = {
    "cactus": "cactuses",
    "dog": "dogs",
    "stop sign": "stop signs",
    "coffee cup": "coffee cups",
    "island": "islands",
    "sheep": "sheep",
    "turtle": "turtles",
    "elephant": "elephants",
    "raccoon": "raccoons",
}
_ITEMS = {  # value: (worn or carried by one, by several)
    "straw hat": ("a straw hat", "straw hats"),
    "neon sunglasses": ("neon sunglasses", "neon sunglasses"),
    "stick": ("a stick", "sticks"),
    "sword": ("a sword", "swords"),
    "scarf": ("a scarf", "scarves"),
    "flag": ("a flag", "flags"),
}
PLACE_PHRASES = {
    "desert": "in the desert",
    "grass": "on the grass",
    "mountains": "in the mountains",
    "lake": "by the lake",
    "under water": "under water",
    "snow": "in the snow",
    "beach": "on the beach",
    "city": "in the city",
}
SKY_PHRASES = {
    "noon": "at noon",
    "sunset": "at sunset",
    "night": "at night",
    "dawn": "at dawn",
    "storm": "in a storm",
    "rainbow": "under a rainbow",
}
POSITION_PHRASES = {"left": "on the left", "center": "in the center", "right": "on the right"}
_ARRANGEMENTS = {
    "one": "alone",
    "two": "side by side",
    "three": "one behind two",
    "four": "in two rows",
}

_SHORT = (
    "{group} with {item} {position}, {place} {sky}",
    "{place} {sky}: {group} with {item} {position}",
    "{group} {position}, with {item}, {place} {sky}",
)
_LONG = (
    "The picture shows {group}. {They} {have} {item}. {They} {stand} {arrangement} {position}, {size}, {place} {sky}.",
    "This is a picture {place} {sky}. It shows {group} with {item}. "
    "{They} {are} {size} and {stand} {arrangement} {position}.",
)


def noun(scene: Scene) -> str:
    """The subject as a noun, plural if there are several: "dogs"."""
    return scene.subject if scene.number == 1 else plural(scene.subject)


def plural(subject: str) -> str:
    """Several of a subject: "dogs"."""
    return _PLURALS[subject]


def item_phrase(item: str, number: int) -> str:
    """An item with its article if one subject has it: "a straw hat", "straw hats"."""
    return _ITEMS[item][0 if number == 1 else 1]


def group_phrase(scene: Scene) -> str:
    """How many of what color: "two red stop signs saying 1984"."""
    year = f" saying {scene.year}" if scene.subject == "stop sign" else ""
    return f"{scene.count} {scene.color} {noun(scene)}{year}"


def short_caption(scene: Scene) -> str:
    """One phrase of at most 19 words that states every attribute (and the year on a stop sign)."""
    return _fill(_SHORT[int(scene.layout.phrase * len(_SHORT))], scene)


def long_caption(scene: Scene) -> str:
    """Three sentences that state every attribute and how the subjects are laid out."""
    return _fill(_LONG[int(scene.layout.phrase * 7) % len(_LONG)], scene)


def _fill(template: str, scene: Scene) -> str:
    one = scene.number == 1
    return template.format(
        group=group_phrase(scene),
        item=item_phrase(scene.item, scene.number),
        position=POSITION_PHRASES[scene.position],
        place=PLACE_PHRASES[scene.place],
        sky=SKY_PHRASES[scene.sky],
        arrangement=_ARRANGEMENTS[scene.count],
        size="big" if scene.layout.size >= 0.5 else "small",
        They="It" if one else "They",
        have="has" if one else "have",
        stand="stands" if one else "stand",
        are="is" if one else "are",
    )


def _forms(name: str, value: str) -> tuple[str, ...]:
    if name == "subject":
        return value, _PLURALS[value]
    if name == "item":
        return tuple(phrase.removeprefix("a ") for phrase in _ITEMS[value])
    return (value,)


def _pattern(name: str) -> re.Pattern[str]:
    # Longest first, so that no form hides a longer one that begins alike.
    forms = sorted((form for value in ATTRIBUTES[name] for form in _forms(name, value)), key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(forms) + r")\b")


_VALUES = {
    name: {form: value for value in values for form in _forms(name, value)} for name, values in ATTRIBUTES.items()
}
_PATTERNS = {name: _pattern(name) for name in ATTRIBUTES}
# "one behind two" arranges, it does not count; and so the number is the one that stands before a color or a subject.
_COUNT = re.compile(
    r"\b(a|an|"
    + "|".join(ATTRIBUTES["count"])
    + r")(?= (?:"
    + _PATTERNS["color"].pattern
    + "|"
    + _PATTERNS["subject"].pattern
    + "))"
)


def parse_caption(text: str) -> dict[str, str]:
    """The attributes that a caption states, by attribute name; what it does not state is absent.

    Reads short and long captions of this module and what a model makes of them: letter case, punctuation and stray
    words do not matter, and of two values for one attribute the first counts.
    """
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    found: dict[str, str] = {}
    for name, pattern in _PATTERNS.items():
        match = _COUNT.search(words) if name == "count" else pattern.search(words)
        if match:
            word = match.group(1)
            found[name] = "one" if name == "count" and word in ("a", "an") else _VALUES[name][word]
    return found


def parse_year(text: str) -> str | None:
    """The first four-digit number of a text, as a stop sign carries one."""
    match = re.search(r"\b\d{4}\b", text)
    return match.group() if match else None

"""The space of scenes: attributes, free layout, and the split that holds whole combinations out."""

import dataclasses
import functools
import hashlib
import itertools
from typing import Any, Literal

import numpy as np

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": ("cactus", "dog", "stop sign", "coffee cup", "island", "sheep", "turtle", "elephant", "raccoon"),
    "color": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "place": ("desert", "grass", "mountains", "lake", "under water", "snow", "beach", "city"),
    "sky": ("noon", "sunset", "night", "dawn", "storm", "rainbow"),
    "item": ("straw hat", "neon sunglasses", "stick", "sword", "scarf", "flag"),
    "count": ("one", "two", "three", "four"),
    "position": ("left", "center", "right"),
}

GROUND_DETAILS = 14  # pebbles, tufts, flakes ... scattered over the ground

Triple = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What no attribute fixes; every number is uniform in [0, 1) and means the same for every attribute value.

    Attributes:
      size: of the subjects, within the range that their count allows.
      shift: (x, y) of the group around its position.
      light: (x, y) of sun, moon, lightning or rainbow.
      clouds: (x, y) of each cloud.
      hills: phases and heights of what stands on the horizon.
      ground: (x, y) of each detail on the ground.
      flip: the subjects look to the left if below one half (in the center; elsewhere they look inwards).
      phrase: chooses between equal ways to say the same.
    """

    size: float
    shift: tuple[float, float]
    light: tuple[float, float]
    clouds: tuple[tuple[float, float], ...]
    hills: tuple[float, ...]
    ground: tuple[tuple[float, float], ...]
    flip: float
    phrase: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture before it is drawn: an attribute value of each kind, a year for stop signs, and the layout."""

    subject: str
    color: str
    place: str
    sky: str
    item: str
    count: str
    position: str
    year: str
    layout: Layout

    def __post_init__(self):
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"scene {name}: {getattr(self, name)!r} is not one of {', '.join(values)}")
        if not (len(self.year) == 4 and self.year.isdecimal()):
            raise ValueError(f"scene year: expected four digits, found {self.year!r}")

    @property
    def attributes(self) -> dict[str, str]:
        """The value of every attribute, in the order of `ATTRIBUTES`."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    def with_value(self, attribute: str, value: str) -> "Scene":
        """The same scene with another value of one attribute."""
        changes: dict[str, Any] = {attribute: value}
        return dataclasses.replace(self, **changes)

    @property
    def number(self) -> int:
        """How many subjects there are, 1 to 4."""
        return ATTRIBUTES["count"].index(self.count) + 1

    @property
    def triple(self) -> Triple:
        """The combination that decides the split."""
        return self.subject, self.color, self.place


@functools.cache
def _held_out_places(subject: str) -> tuple[str, ...]:
    """The place held out for each colour: a hashed order of all places, so every value is held out equally often."""
    return tuple(sorted(ATTRIBUTES["place"], key=lambda place: hashlib.sha256(f"{subject}/{place}".encode()).digest()))


def held_out(triple: Triple) -> bool:
    """Whether this (subject, color, place) is kept for the split "valid": one in eight, fixed for ever."""
    subject, color, place = triple
    return _held_out_places(subject)[ATTRIBUTES["color"].index(color)] == place


@functools.cache
def triples(split: Split) -> tuple[Triple, ...]:
    """All (subject, color, place) of a split; the two splits share none.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes split: {split!r} is not one of {', '.join(SPLITS)}")
    every = itertools.product(ATTRIBUTES["subject"], ATTRIBUTES["color"], ATTRIBUTES["place"])
    return tuple(triple for triple in every if held_out(triple) == (split == "valid"))


def generator(seed: int, split: Split, index: int, *stream: int) -> np.random.Generator:
    """The random numbers of scene `index`; other streams of the same scene are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, *stream)))


def sample(seed: int, split: Split, index: int) -> Scene:
    """Scene `index` of a split: a pure function of its arguments, uniform over the split's combinations."""
    choices = triples(split)
    rng = generator(seed, split, index)
    subject, color, place = choices[rng.integers(len(choices))]
    others = {name: ATTRIBUTES[name][rng.integers(len(ATTRIBUTES[name]))] for name in list(ATTRIBUTES)[3:]}
    year = str(rng.integers(1900, 2100))
    return Scene(subject=subject, color=color, place=place, year=year, layout=_layout(rng), **others)


def _layout(rng: np.random.Generator) -> Layout:
    def pairs(n: int) -> tuple[tuple[float, float], ...]:
        return tuple((x, y) for x, y in rng.random((n, 2)).tolist())

    size, flip, phrase = rng.random(3).tolist()
    shift, light = pairs(2)
    return Layout(
        size=size,
        shift=shift,
        light=light,
        clouds=pairs(3),
        hills=tuple(rng.random(8).tolist()),
        ground=pairs(GROUND_DETAILS),
        flip=flip,
        phrase=phrase,
    )

"""Configuration: what is built is what was said, and every mistake is named."""

import dataclasses
import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3jax.config import ConfigError, build, dumps, fingerprint, to_dict


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    name: str = "run"
    norm: Literal["rms", "layer"] = "rms"
    resume: bool = True
    sizes: tuple[int, ...] = ()
    optim: Optim = Optim()
    extra: Optim | None = None

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, found {self.steps}")


@dataclasses.dataclass(frozen=True)
class Outer:
    run: Run


finite = st.floats(allow_nan=False, allow_infinity=False)
optims = st.builds(Optim, learning_rate=finite, betas=st.tuples(finite, finite), clip=st.none() | finite)
runs = st.builds(
    Run,
    steps=st.integers(0, 1 << 40),
    name=st.text(),
    norm=st.sampled_from(["rms", "layer"]),
    resume=st.booleans(),
    sizes=st.lists(st.integers()).map(tuple),
    optim=optims,
    extra=st.none() | optims,
)


@given(runs)
def test_round_trip_through_plain_values_and_json(run):
    assert build(Run, to_dict(run)) == run
    assert build(Run, json.loads(dumps(run))["config"]) == run


@given(runs, runs)
def test_fingerprints_are_equal_exactly_where_configs_are(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (to_dict(a) == to_dict(b))
    assert fingerprint(a) == fingerprint(to_dict(a)) == json.loads(dumps(a))["fingerprint"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2},
        {"name": "other"},
        {"norm": "layer"},
        {"resume": False},
        {"sizes": (1,)},
        {"optim": Optim(betas=(0.9, 0.99))},
        {"optim": Optim(clip=None)},
        {"extra": Optim()},
    ],
)
def test_fingerprint_changes_with_every_field(change):
    run = Run(steps=1)
    assert fingerprint(dataclasses.replace(run, **change)) != fingerprint(run)
    assert len(fingerprint(run)) == 16


def test_defaults_and_conversions():
    run = build(Run, {"steps": 3, "sizes": [1, 2], "optim": {"learning_rate": 1, "betas": [0, 1]}})
    assert run == Run(steps=3, sizes=(1, 2), optim=Optim(learning_rate=1.0, betas=(0.0, 1.0)))
    assert isinstance(run.optim.learning_rate, float)
    assert build(Run, {"steps": 3, "optim": Optim(clip=None)}).optim.clip is None
    assert build(Run, {"steps": 3, "extra": {"clip": None}}).extra == Optim(clip=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "nam": "x"}, "unknown config key nam; did you mean name?"),
        (
            {"steps": 1, "optim": {"lerning_rate": 1.0}},
            "unknown config key optim.lerning_rate; did you mean optim.learn",
        ),
        ({"steps": 1, "zzz": 1}, "unknown config key zzz; known keys: extra, name"),
        ({}, r"missing config key steps \(int\)"),
        ({"steps": 1.5}, r"config steps: expected int, found 1.5 \(float\)"),
        ({"steps": True}, r"config steps: expected int, found True \(bool\)"),
        ({"steps": "1"}, r"config steps: expected int, found '1' \(str\)"),
        ({"steps": 1, "resume": 1}, "config resume: expected bool, found 1"),
        ({"steps": 1, "name": None}, "config name: expected str, found None"),
        ({"steps": 1, "norm": "batch"}, "config norm: 'batch' is not one of 'rms', 'layer'"),
        ({"steps": 1, "sizes": 4}, "config sizes: expected a tuple, found 4"),
        ({"steps": 1, "sizes": "ab"}, "config sizes: expected a tuple, found 'ab'"),
        ({"steps": 1, "sizes": [1, "x"]}, r"config sizes\[1\]: expected int, found 'x'"),
        ({"steps": 1, "optim": {"betas": [0.9]}}, r"config optim.betas: expected 2 items, found \[0.9\]"),
        ({"steps": 1, "optim": 3}, "config optim: expected a group of keys, found 3"),
        ({"steps": 1, "optim": {"clip": "x"}}, "config optim.clip: expected float, found 'x'"),
        ({"steps": 1, "optim": {"learning_rate": False}}, "config optim.learning_rate: expected float, found False"),
        ({"steps": -1}, "config Run: steps must be >= 0, found -1"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Run, values)


def test_an_error_inside_a_group_names_the_group():
    with pytest.raises(ConfigError, match="config run: steps must be >= 0"):
        build(Outer, {"run": {"steps": -1}})

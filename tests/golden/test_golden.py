"""What the layout and the compiled update are, array by array and collective by collective, on eight CPU devices.

The files beside this one hold what was found when they were written. After a change that is meant, write them anew,
look at the difference, and commit it with the change:

    CM3_WRITE_GOLDEN=1 launch/test.sh tests/golden

What the compiler makes of the update depends on its version: those files have that of jax in their names.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import pytest

from cm3jax.data.plan import PlanConfig
from cm3jax.models.config import chameleon, cm3leon
from cm3jax.parallel.layout import layout_text
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.perf.aot import compile_update
from cm3jax.perf.collectives import collectives_text, find_collectives
from cm3jax.perf.hlo import parse
from cm3jax.tasks.lm import LMConfig, LMTask
from cm3jax.tasks.update import abstract_state
from cm3jax.tokens.vocabulary import Vocabulary

FOLDER = Path(__file__).parent
VOCABULARY = Vocabulary(text_size=320, image_size=8, sentinels=8, size=352)
MESHES = {
    "one": (MeshConfig(data=1), 1),
    "data8": (MeshConfig(data=8), 8),
    "fsdp8": (MeshConfig(data=1, fsdp=8), 8),
    "tensor8": (MeshConfig(data=1, tensor=8), 8),
    "cube": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
}
MODELS = {
    "cm3leon": dataclasses.replace(cm3leon(64, 2, 8, VOCABULARY.size, 64), remat="full"),
    "chameleon": dataclasses.replace(chameleon(64, 2, 8, 8, 128, VOCABULARY.size, 64), remat="dots"),
}


def make_task(model):
    config = LMConfig(
        model=MODELS[model],
        train=(),
        valid=(),
        image_tokenizer="none",
        text_tokenizer="none",
        plan=PlanConfig(64),
        vocabulary=VOCABULARY,
        batch_size=16,
        accumulate=2,
        loss_chunk=128,
    )
    return LMTask(config, seed=0, steps=10)


CASES = [*(("cm3leon", mesh) for mesh in MESHES), ("chameleon", "cube")]
COMPILER = "jax" + ".".join(jax.__version__.split(".")[:2])


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    """Name, task, mesh and abstract state of one golden file."""
    model, name = request.param
    task, (config, devices) = make_task(model), MESHES[name]
    mesh = make_mesh(config, jax.devices()[:devices])
    return f"{model}-{name}", task, mesh, abstract_state(task, mesh)


def check(name, found):
    path = FOLDER / f"{name}.txt"
    if os.environ.get("CM3_WRITE_GOLDEN"):
        path.write_text(found)
    if not path.exists():
        pytest.skip(f"NOT COMPARED: there is no {path.name}; the head of {Path(__file__).name} says how to write it")
    assert found == path.read_text(), f"{path.name} differs; the head of {Path(__file__).name} says how to renew it"


def test_every_array_is_laid_out_as_before(case):
    name, _, mesh, state = case
    check(f"{name}-layout", layout_text(mesh, state, jax.tree.map(lambda a: a.sharding.spec, state)))


def test_the_update_sends_what_it_sent_before_and_rematerialises_nothing_whole(case, capfd):
    name, task, mesh, state = case
    compiled = compile_update(task, mesh, state)
    sys.stderr.flush()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    check(f"{name}-collectives-{COMPILER}", collectives_text(find_collectives(parse(compiled.as_text()), mesh)))

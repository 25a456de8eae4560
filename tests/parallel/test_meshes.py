"""Every task computes the same on every mesh: the losses of fifty updates, fp32, to 1e-6 of their size."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3jax.data.loader import device_batches
from cm3jax.data.plan import PlanConfig
from cm3jax.models.clip_config import CLIPConfig, TowerConfig
from cm3jax.models.config import cm3leon
from cm3jax.models.discriminator import DiscriminatorConfig
from cm3jax.models.vqgan import VQGANConfig
from cm3jax.optim import OptimConfig
from cm3jax.parallel.mesh import MeshConfig, make_mesh, one_device
from cm3jax.parallel.specs import batch_sharding
from cm3jax.tasks.clip import CLIPTask, CLIPTaskConfig
from cm3jax.tasks.lm import DatasetConfig, LMConfig, LMTask
from cm3jax.tasks.update import FLAGS, Flags, abstract_state, lower_update
from cm3jax.tasks.vqgan import ImageDataConfig, VQGANLossConfig, VQGANTask, VQGANTaskConfig
from cm3jax.tokens.vocabulary import Vocabulary

STEPS = 50
EPOCH = 8
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def lm(records):
    vocabulary = Vocabulary(text_size=320, image_size=8, sentinels=8, size=352)
    config = LMConfig(
        model=dataclasses.replace(cm3leon(64, 2, 8, vocabulary.size, 64), init_std=0.05, position_std=0.05),
        train=(DatasetConfig(str(records / "train")),),
        valid=(DatasetConfig(str(records / "valid")),),
        image_tokenizer="none",
        text_tokenizer="none",
        plan=PlanConfig(64),
        vocabulary=vocabulary,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10),
        batch_size=8,
        loss_chunk=128,
    )
    return LMTask(config, seed=1, steps=STEPS)


def vqgan(_):
    config = VQGANTaskConfig(
        model=VQGANConfig(
            16, 32, (1,), codes=16, res_blocks=1, z_channels=32, embed_dim=4, norm_groups=4, stem_patch=4
        ),
        data=ImageDataConfig("scenes:count=64,size=16", valid="scenes:count=32,size=16"),
        loss=VQGANLossConfig(discriminator=DiscriminatorConfig(channels=32, layers=1), disc_start=25),
        batch_size=8,
        # The published rates. Nearest codes are a discontinuous choice: at a thousandth, rounding decides it soon.
        learning_rate=5e-6,
        disc_learning_rate=5e-6,
        warmup_steps=10,
        revive_after=10,
    )
    return VQGANTask(config, seed=0, steps=STEPS)


def clip(records):
    config = CLIPTaskConfig(
        model=CLIPConfig(
            32,
            TowerConfig(64, 1, 8),
            TowerConfig(64, 1, 8),
            image_size=32,
            patch_size=8,
            vocab_size=320,
            context=24,
            end_id=2,
        ),
        tokenizer=str(records / "text.model"),
        source="scenes:count=64,size=32",
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=10),
        batch_size=8,
    )
    return CLIPTask(config, seed=0, steps=STEPS)


def losses(task, name, mesh):
    with jax.set_mesh(mesh):
        abstract = abstract_state(task, mesh)
        state = jax.jit(task.init, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))(jax.random.key(0))
        update = lower_update(task, mesh, state).compile()
        quiet, found = Flags(mesh, FLAGS).raised([False] * FLAGS), []
        for batch in device_batches(task.examples, task.batch_size, 0, STEPS, batch_sharding(mesh)):
            state, metrics, _ = jax.block_until_ready(update(state, batch, quiet))
            found.append(float(metrics[name]))
    return np.asarray(found)


TASKS = [(lm, "loss"), (vqgan, "reconstruction_loss"), (clip, "loss")]


@pytest.fixture(scope="module", params=TASKS, ids=[make.__name__ for make, _ in TASKS])
def single(request, scene_records):
    """A task, the name of its loss, and its losses on one device."""
    make, name = request.param
    task = make(scene_records)
    return task, name, losses(task, name, one_device())


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_do_not_depend_on_the_mesh(single, mesh):
    task, name, expected = single
    assert expected[-EPOCH:].mean() < expected[:EPOCH].mean()
    np.testing.assert_allclose(losses(task, name, make_mesh(MESHES[mesh])), expected, rtol=1e-6)

"""`cm3 aot`: what it says, what it refuses, and that what is compiled ahead of time is what runs."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from cm3jax import cli
from cm3jax.config import ConfigError
from cm3jax.data.plan import PlanConfig
from cm3jax.models.config import cm3leon
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding
from cm3jax.perf import topology
from cm3jax.perf.aot import Memory, Prediction, _text, compile_update, device_bytes, predict
from cm3jax.perf.aot_report import best, prediction_text, prediction_values, sweep_table
from cm3jax.perf.roofline import Roofline
from cm3jax.perf.sweep import likely_meshes, parse_meshes, sweep
from cm3jax.perf.topology import Topology, described_devices, parse_topology
from cm3jax.tasks.lm import LMConfig, LMTask
from cm3jax.tasks.update import FLAGS, abstract_state
from cm3jax.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=320, image_size=8, sentinels=8, size=352)


def make_task(**model):
    config = LMConfig(
        model=dataclasses.replace(cm3leon(64, 2, 4, VOCABULARY.size, 128), init_std=0.05, **model),
        train=(),
        valid=(),
        image_tokenizer="none",
        text_tokenizer="none",
        plan=PlanConfig(128),
        vocabulary=VOCABULARY,
        batch_size=8,
        accumulate=2,
        loss_chunk=256,
    )
    return LMTask(config, seed=0, steps=10)


def test_compiled_ahead_of_time_and_jitted_give_the_same_bits():
    task, mesh = make_task(n_layers=1), make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    state = abstract_state(task, mesh)
    compiled, rng = compile_update(task, mesh, state), np.random.default_rng(0)
    rows = batch_sharding(mesh)
    shape = task.batch_shapes()["tokens"].shape
    batch = {
        "tokens": jax.device_put(rng.integers(0, VOCABULARY.size, shape, np.int32), rows),
        "weights": jax.device_put(np.ones(shape, np.float32), rows),
    }
    quiet = jax.device_put(np.zeros((2, FLAGS), bool), jax.tree.leaves(compiled.input_shardings[0])[-1])
    with jax.set_mesh(mesh):
        init = jax.jit(task.init, out_shardings=jax.tree.map(lambda a: a.sharding, state))
        expected, found = init(jax.random.key(0)), init(jax.random.key(0))
        step = jax.jit(task.step)
        for _ in range(2):
            expected, wanted = step(expected, batch)
            found, metrics, _ = jax.block_until_ready(compiled(found, batch, quiet))
            assert np.asarray(metrics["loss"]).tobytes() == np.asarray(wanted["loss"]).tobytes()
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_bytes_of_the_state_on_each_device():
    task, mesh = make_task(), make_mesh(MeshConfig(data=1, fsdp=8))
    state = abstract_state(task, mesh)
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params)) * 4
    assert device_bytes(state.params) == total // 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v5p:8x8x8", Topology("v5p", (8, 8, 8))),
        ("2*v5p:8x8x8", Topology("v5p", (8, 8, 8), 2)),
        ("v6e:16x16", Topology("v6e", (16, 16))),
    ],
)
def test_topologies_are_read_and_written(text, expected):
    assert parse_topology(text) == expected
    assert str(expected) == text
    assert parse_topology(text.removeprefix("2*"), expected.slices).devices == expected.devices


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5p", None, "topology 'v5p': expected CHIP:SIDESxSIDES"),
        ("v9:4x4", None, "with a CHIP of v4, v5e, v5p, v6e"),
        ("h100:8", None, "with a CHIP of v4, v5e, v5p, v6e"),
        ("v5p:16x16", None, "v5p has 3 sides of at least 1 chip, found 2"),
        ("v6e:16x0", None, "v6e has 2 sides of at least 1 chip"),
        ("2*v5p:4x4x4", 2, "says its slices, and --slices says 2"),
        ("v5p:4x4x4", -1, "expected at least 1 slice, found -1"),
    ],
)
def test_wrong_topologies_are_refused(text, slices, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        parse_topology(text, slices)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu, which is not installed: pip install -e '.\[aot\]'"):
        described_devices(Topology("v5p", (2, 2, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5q:8x8x8"], "topology 'v5q:8x8x8'"),
        (["--topology=v5p:8x8x8", "--config.lm.modl=1"], "modl"),
        (["--topology=v5p:8x8x8", "--config.run.mesh.tensor=3"], "does not cover 512 devices"),
        (["--topology=v5p:16x16x16", "--config.run.mesh.tensor=1"], "batch_size 2048 is not divisible by the 4096"),
        (["--topology=v5p:8x8x8", "--sweep", "--meshes=fsdp=x"], "mesh 'fsdp=x': expected AXIS=SIZE"),
        (["--topology=v5p:8x8x8", "--sweep", "--microbatches=0"], "--microbatches '0': expected numbers above 0"),
        (["--topology=v5p:8x8x8", "--sweep", "--remats=some"], "--remats 'some': 'some' is not one of none, dots"),
    ],
)
def test_the_command_refuses_with_one_line(arguments, message, repo_root, capsys):
    assert cli.main(["aot", f"--config={repo_root}/configs/lm/7b.py", "--dry-run", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err


def test_a_dry_run_says_what_would_be_compiled(repo_root, capsys):
    command = ["aot", f"--config={repo_root}/configs/lm/7b.py", "--topology=v5p:4x4x8", "--slices=2", "--dry-run"]
    assert cli.main([*command, "--config.lm.accumulate=4"]) == 0
    printed = capsys.readouterr().out
    assert "2*v5p:4x4x8, 256 chips" in printed and "'replica': 2" in printed
    assert "2048 sequences of 4096 tokens in 4 microbatches" in printed
    assert cli.main([*command, "--sweep", "--meshes=replica=2,data=1,fsdp=-1;replica=2,data=-1,fsdp=8"]) == 0
    assert capsys.readouterr().out.count("2*v5p:4x4x8: mesh") == 2


def prediction(needed, mfu=0.5):
    line = Roofline(1.0, 1.0, 0.0, 0.0, {"fsdp": 0.5}, {}, 1.0, mfu)
    fits = needed <= 16 * 2**30
    return Prediction(
        device_kind="TPU v5 lite",
        devices=4,
        mesh={"replica": 1, "data": 1, "fsdp": 4, "tensor": 1},
        params=10**9,
        hbm_bytes=16 * 2**30,
        needed_bytes=needed,
        memory=Memory(1, 2, 3, int(needed)) if fits else None,
        model_flops=1e15,
        executed_flops=2e15,
        collectives=[("all-gather", "fsdp", 7, 2**30)],
        memory_traffic=1e9,
        roofline=line if fits else None,
        seconds=1.0,
        cpu_seconds=2.0,
    )


def test_reports_say_what_fits():
    good, bad = prediction(8 * 2**30), prediction(float("inf"))
    assert "8.00 GiB of 16.00 GiB: fits" in prediction_text(good)
    assert "more than there is of 16.00 GiB: DOES NOT FIT" in prediction_text(bad)
    assert prediction_values(bad)["needed_bytes"] is None
    assert json.loads(json.dumps(prediction_values(good)))["fits"] is True
    rows = [("a", good), ("b", prediction(1, 0.6)), ("c", bad), ("d", "no such mesh")]
    assert best(rows)[0] == "b"
    assert [line.split()[-1] for line in sweep_table(rows).splitlines()] == ["50.0%", "60.0%", "fit", "mesh"]
    assert best([("c", bad), ("d", "no such mesh")]) is None


def test_a_sweep_stops_where_the_rest_can_only_be_worse():
    tried = []

    def predict_rule(rule):
        tried.append((rule.mesh.tensor, rule.microbatch, rule.remat))
        if rule.mesh.tensor == 3:
            raise ConfigError("three")
        # One sequence fits as it is, two only with all recomputed, four never.
        fits = {1: True, 2: rule.remat == "full", 4: False}[rule.microbatch]
        return prediction(1 if fits else float("inf"))

    meshes = [MeshConfig(tensor=1), MeshConfig(tensor=3)]
    found = list(sweep("v5e", meshes, [4, 2, 1], ["full", "none"], predict_rule))
    assert tried == [(1, 1, "none"), (1, 2, "none"), (1, 2, "full"), (1, 4, "none"), (1, 4, "full"), (3, 1, "none")]
    assert found[-1][1] == "three"


def test_meshes_of_a_sweep():
    assert parse_meshes("data=8,fsdp=-1; tensor=2,fsdp=4") == [
        MeshConfig(data=8, fsdp=-1),
        MeshConfig(data=1, fsdp=4, tensor=2),
    ]
    assert likely_meshes(128, 1)[1] == MeshConfig(data=-1, fsdp=64)
    assert {mesh.replica for mesh in likely_meshes(128, 2)} == {2}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="LIBTPU ABSENT: nothing was compiled for TPUs")
def test_an_update_is_compiled_for_chips_that_are_not_here():
    devices = described_devices(Topology("v5p", (2, 2, 1)))
    assert len(devices) == 4
    task, mesh = make_task(dtype="bfloat16", remat="full"), make_mesh(MeshConfig(data=1, fsdp=4), devices)
    found = predict(task, mesh)
    assert found.fits and found.device_kind == "TPU v5"
    assert found.memory.params * 4 == found.params * 4
    assert any(axes == "fsdp" and times >= 2 for _, axes, times, _ in found.collectives)
    assert 0 < found.roofline.mfu < 1
    assert found.executed_flops > found.model_flops
    with pytest.raises(ConfigError, match=r"topology v5p:3x3x3: .*"):
        described_devices(Topology("v5p", (3, 3, 3)))


def test_a_program_that_this_jax_cannot_read_is_one_clear_error():
    class Newer:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    with pytest.raises(
        ValueError, match=r"jax .* cannot read what this libtpu compiled; the constraints files.*RET_CHECK"
    ):
        _text(Newer())

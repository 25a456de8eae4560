"""Machine rules: what a configuration becomes on the devices at hand."""

import pytest

from cm3jax.commands import config_keys, read_config
from cm3jax.config import ConfigError, build
from cm3jax.machines import MACHINE_KEYS, resolve
from cm3jax.perf.hardware import HARDWARE
from cm3jax.train import Config

SIZES = ("350m", "760m", "7b")


def rule(chip, **values):
    mesh = {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1}
    return {"chip": chip, "mesh": mesh, "microbatch": 2, "remat": "full"} | values


def values(*rules):
    return {
        "machines": rules,
        "run": {"steps": 1, "mesh": {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}},
        "lm": {"batch_size": 64, "accumulate": 1, "loss_chunk": 1, "plan": {"length": 128}, "model": {"remat": "none"}},
    }


def test_the_rule_of_the_devices_fills_in_the_layout():
    given = values(rule("v5p"), rule("v4", microbatch=1))
    found = resolve(given, "TPU v5", 8)
    assert found["run"]["mesh"] == {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1}
    # 64 sequences over 8 devices, two at once; all 256 tokens of both at once, on 8 devices.
    assert (found["lm"]["accumulate"], found["lm"]["loss_chunk"], found["lm"]["model"]["remat"]) == (4, 2048, "full")
    assert "machines" not in found and "machines" in given
    assert resolve(given, "TPU v4", 8)["lm"]["accumulate"] == 8


def test_more_devices_take_the_next_rule_and_tensors_are_shared():
    wide = rule("v5p", devices=32, remat="dots", mesh={"data": 1, "fsdp": -1, "tensor": 4}, loss_tokens=64)
    given = values(rule("v5p"), wide)
    assert resolve(given, "v5p", 31 + 1)["lm"] == {
        "batch_size": 64,
        "accumulate": 4,
        "loss_chunk": 8 * 64,
        "plan": {"length": 128},
        "model": {"remat": "dots", "scan_layers": True, "attention_backend": "auto"},
    }
    assert resolve(given, "v5p", 16)["lm"]["model"]["remat"] == "full"


def test_microbatches_are_equal_and_not_larger_than_the_rule_says():
    assert resolve(values(rule("v5p", microbatch=5)), "v5p", 8)["lm"]["accumulate"] == 2
    assert resolve(values(rule("v5p", microbatch=100)), "v5p", 8)["lm"]["accumulate"] == 1


def test_the_command_line_wins_over_the_rule():
    overridden = config_keys(["--config.run.mesh.tensor=2", "--config.lm.accumulate=1"])
    given = values(rule("v5p"))
    given["run"]["mesh"]["tensor"] = 2
    found = resolve(given, "v5p", 8, overridden)
    assert found["run"]["mesh"] == {"replica": 1, "data": 1, "fsdp": -1, "tensor": 2}
    assert (found["lm"]["accumulate"], found["lm"]["model"]["remat"]) == (1, "full")


def test_an_unknown_machine_is_refused_unless_a_mesh_is_given():
    given = values(rule("v5p", devices=16), rule("h200"))
    with pytest.raises(ConfigError, match=r"no machine rule for 8 x v5p; known: v5p from 16 on, h200 from 1 on"):
        resolve(given, "TPU v5p", 8)
    found = resolve(given, "TPU v9", 8, {"run.mesh.fsdp"})
    assert found == {name: group for name, group in given.items() if name != "machines"}


def test_a_configuration_without_rules_is_left_as_it_is():
    given = values()
    assert resolve(given, "TPU v9", 3) == {name: group for name, group in given.items() if name != "machines"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"remat": "some"}, r"machines\[0\].remat: 'some' is not one of"),
        ({"microbatch": 0}, "microbatch must be >= 1, found 0"),
        ({"mehs": {}}, r"unknown config key machines\[0\].mehs; did you mean machines\[0\].mesh"),
        ({"mesh": {"data": 1, "fsdp": 3}}, "does not cover 8 devices"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "at most one axis may be -1"),
    ],
)
def test_a_wrong_rule_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        resolve(values(rule("v5p") | changed), "v5p", 8)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="lm.batch_size 64 is not divisible by the 128 device groups"):
        resolve(values(rule("v5p")), "v5p", 128)


@pytest.mark.parametrize("size", SIZES)
def test_every_rule_of_the_papers_sizes_makes_a_run_of_8m_tokens(size, repo_root):
    given = read_config([f"--config={repo_root}/configs/lm/{size}.py"])
    chips = {row.name for row in HARDWARE}
    assert {found["chip"] for found in given["machines"]} <= chips
    for found in given["machines"]:
        assert (repo_root / "launch" / "flags" / f"{found['flags'] or found['chip']}.sh").is_file()
        config = build(Config, resolve(given, found["chip"], max(found["devices"], 64)))
        assert config.lm.batch_size * config.lm.plan.length == 2**23
        assert config.lm.loss_chunk <= config.lm.batch_size // config.lm.accumulate * config.lm.plan.length


def test_what_rules_decide_are_keys_of_the_configuration(repo_root):
    given = read_config([f"--config={repo_root}/configs/lm/350m.py"])
    for key in MACHINE_KEYS:
        group = given
        for name in key.split("."):
            group = group[name]

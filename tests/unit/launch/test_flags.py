"""Flag files: what they set, what they leave alone, and whether the compilers know it."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

CHIPS = ("v4", "v5e", "v5p", "v6e", "gpu")
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def flags(repo_root, chip, variable, **environment):
    """The value of a variable after a flag file, None where it is not set."""
    line = f"source launch/flags/{chip}.sh && env --null"
    clean = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        capture_output=True, text=True, check=True, cwd=repo_root, env=clean | environment,
    )  # fmt: skip
    assert done.stderr == ""
    found = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    return found.get(variable)


def variable_of(chip):
    return "XLA_FLAGS" if chip == "gpu" else "LIBTPU_INIT_ARGS"


@pytest.mark.parametrize("chip", CHIPS)
def test_every_flag_is_set_once_and_explained(repo_root, chip):
    found = flags(repo_root, chip, variable_of(chip)).split()
    names = [flag.split("=")[0] for flag in found]
    assert len(set(names)) == len(names) >= 3
    assert all(re.fullmatch(r"--xla_[a-z0-9_]+=[a-z0-9]+", flag) for flag in found)
    text = (repo_root / "launch" / "flags" / f"{chip}.sh").read_text()
    # Every paragraph that sets something says why, and where that is known from.
    for paragraph in text.split("\n\n"):
        if re.search(r"^default_(flag|variable) ", paragraph, re.MULTILINE):
            assert "Source: " in paragraph or "from the v5p recipes" in paragraph, paragraph


@pytest.mark.parametrize("chip", CHIPS)
def test_what_the_user_set_wins_and_the_rest_is_added(repo_root, chip):
    variable = variable_of(chip)
    own = flags(repo_root, chip, variable).split()
    name = own[-1].split("=")[0]
    # Separated by more than one space or by a line end, as people write them.
    found = flags(repo_root, chip, variable, **{variable: f"--xla_other=1\n  {name}=mine"}).split()
    assert found[:2] == ["--xla_other=1", f"{name}=mine"]
    assert found[2:] == own[:-1]


def test_a_name_that_is_only_the_beginning_of_another_is_no_match(repo_root):
    given = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib_other=1"}
    assert "--xla_tpu_scoped_vmem_limit_kib=49152" in flags(repo_root, "v6e", "LIBTPU_INIT_ARGS", **given)


def test_a_file_of_flags_is_left_alone(repo_root):
    assert flags(repo_root, "gpu", "XLA_FLAGS", XLA_FLAGS="my-flags.txt") == "my-flags.txt"


@pytest.mark.parametrize(
    ("chip", "variable", "default"),
    [("gpu", "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9"), ("v4", "TPU_MEGACORE", "megacore_dense")],
)
def test_variables_are_set_unless_they_are_set(repo_root, chip, variable, default):
    assert flags(repo_root, chip, variable) == default
    assert flags(repo_root, chip, variable, **{variable: "mine"}) == "mine"
    assert flags(repo_root, chip, variable, **{variable: ""}) == ""


def test_jaxlib_knows_the_gpu_flags(repo_root):
    """XLA parses all flags on any device, and ends the process on one that it does not know."""
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    clean = os.environ | {"JAX_PLATFORMS": "cpu"}
    known = subprocess.run(start, env=clean | {"XLA_FLAGS": flags(repo_root, "gpu", "XLA_FLAGS")}, check=False)
    assert known.returncode == 0
    unknown = subprocess.run(
        start, env=clean | {"XLA_FLAGS": "--xla_gpu_no_such_flag=1"}, check=False, capture_output=True
    )
    assert unknown.returncode != 0


COMPILE = """
import sys, jax, numpy as np
from jax.experimental import topologies
P = jax.P
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
place = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
w = jax.ShapeDtypeStruct((4, 512, 512), "bfloat16", sharding=place(None, "fsdp"))
x = jax.ShapeDtypeStruct((1024, 512), "bfloat16", sharding=place("fsdp"))
loss = lambda w, x: jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, w)[0].astype("float32").sum()
jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile()
"""


@pytest.mark.slow
@pytest.mark.parametrize("chip", sorted(TOPOLOGIES))
def test_libtpu_compiles_sharded_layers_with_the_flags_of_the_chip(repo_root, chip):
    """No chip is needed for that: libtpu compiles for a topology that is only described."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("LIBTPU ABSENT: no TPU flag was tried on the compiler; pip install libtpu")
    environment = {
        "LIBTPU_INIT_ARGS": flags(repo_root, chip, "LIBTPU_INIT_ARGS"),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, TOPOLOGIES[chip]],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_cpus_get_large_pages_unless_the_user_set_the_tunables(repo_root):
    assert flags(repo_root, "cpu", "GLIBC_TUNABLES") == "glibc.malloc.hugetlb=1"
    assert flags(repo_root, "cpu", "GLIBC_TUNABLES", GLIBC_TUNABLES="") == ""

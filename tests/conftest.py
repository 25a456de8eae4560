"""What every test runs on: eight virtual CPU devices, so that sharded code is tested as sharded code."""

import os
from pathlib import Path

DEVICES = 8
# Tests compile far more than they compute: without these passes they take less than half the time.
COMPILE_FAST = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

# Read once, when jax starts: both must be set before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={DEVICES}",
        *COMPILE_FAST,
    ]
)

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from cm3jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from cm3jax.tokens.vocabulary import Vocabulary  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Grain's workers read absl flags, which outside of `absl.app.run` are an error until marked as parsed.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs, captions and official metric values that stands beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"REAL DATA ABSENT: {folder} is not there, so this test checked nothing")
    return folder


@pytest.fixture(scope="session")
def tiny_vocabulary() -> Vocabulary:
    """A vocabulary with every kind of id, small enough for models of a few thousand weights."""
    return Vocabulary(text_size=64, image_size=32, sentinels=8, size=128)


@pytest.fixture(scope="session")
def one_device_mesh() -> jax.sharding.Mesh:
    """All four axes, each of size one."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])

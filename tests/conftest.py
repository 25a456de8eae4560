"""What every test runs on: eight virtual CPU devices, so that sharded code is tested as sharded code.

Tests of GPU kernels ask for one: `CM3_TEST_PLATFORM=cuda python -m pytest tests/unit/test_attention.py -k cudnn`.
"""

import os
from pathlib import Path

DEVICES = 8
# Tests compile far more than they compute: without these passes they take less than half the time.
COMPILE_FAST = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

# Read once, when jax starts: both must be set before anything imports jax.
os.environ["JAX_PLATFORMS"] = os.environ.get("CM3_TEST_PLATFORM", "cpu")
# Threads for the collectives that all devices may be in at once; with too few, they wait for each other for ever.
os.environ["PJRT_NPROC"] = str(16 * DEVICES)
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={DEVICES}",
        *COMPILE_FAST,
    ]
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from cm3jax.parallel.mesh import one_device  # noqa: E402
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
    return one_device()


@pytest.fixture(scope="session")
def scene_records(tmp_path_factory) -> Path:
    """A folder with the records `train` (48, five shards) and `valid` (12) of scenes, with 16 image tokens each.

    In the place of an image tokenizer: the brightness of each of 4 x 4 cells, in eight steps.
    """
    from cm3jax.data.sources.scenes import ScenesSource
    from cm3jax.data.tokenize import tokenize_source
    from cm3jax.tokens.text import train_text_tokenizer

    vocabulary = Vocabulary(text_size=320, image_size=8, sentinels=8, size=352)
    size, grid = 32, 4

    def brightness(images):
        cells = images.reshape(len(images), grid, size // grid, grid, size // grid, 3).mean((2, 4, 5))
        return (cells // 32).astype(np.int32).reshape(len(images), -1)

    folder = tmp_path_factory.mktemp("scene_records")
    sources = {"train": ScenesSource("train", 48, size), "valid": ScenesSource("valid", 12, size)}
    lines = [sources["train"][i].segments[0].text for i in range(48)]
    tokenizer = train_text_tokenizer(lines, vocabulary.text_size, folder / "text.model")
    for split, source in sources.items():
        tokenize_source(
            source,
            folder / split,
            split,
            brightness,
            tokenizer,
            vocabulary,
            size,
            image_tokens=grid * grid,
            image_tokenizer="brightness",
            shard_documents=10,
        )
    return folder

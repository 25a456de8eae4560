"""CM3Leon 7b, pre-training (arXiv 2309.02591, table 3: 512 GPUs, 2.4T tokens).

    cm3 train --config=configs/lm/7b.py --workdir=runs/7b --config.lm.train="[...]"
    cm3 aot --config=configs/lm/7b.py --topology=v5p:8x8x8

The rule of the devices at hand decides mesh, microbatches and recomputation. Those of TPUs are predictions
(docs/aot.md has them), those of GPUs guesses from eight layers on one H100 (docs/training.md). Paths of the records and
tokenizers are given on the command line or in a copy of this file.
"""

from ml_collections import ConfigDict

from cm3jax.machines import MachineRule
from cm3jax.models.config import PRESETS
from cm3jax.parallel.mesh import MeshConfig
from cm3jax.recipes import cm3leon_pretraining, gpu_rule

# Weights gathered from 64 chips at most: thinner pieces travel as sums, at twice the bytes.
GROUPS = MeshConfig(data=-1, fsdp=64)
# More chips than sequences: two share one.
PAIRS = MeshConfig(data=-1, fsdp=64, tensor=2)

MACHINES = (
    MachineRule("v4", GROUPS, devices=64, microbatch=1, remat="dots"),
    MachineRule("v5e", GROUPS, devices=64, microbatch=1, remat="full"),
    MachineRule("v5p", GROUPS, devices=64, microbatch=2, remat="dots"),
    MachineRule("v5p", PAIRS, devices=4096, microbatch=1, remat="dots"),
    MachineRule("v6e", GROUPS, devices=64, microbatch=2, remat="dots"),
    gpu_rule("h100", microbatch=4, devices=16),
    gpu_rule("h200", microbatch=8, devices=16),
)


def get_config() -> ConfigDict:
    return cm3leon_pretraining(PRESETS["cm3leon-7b"], learning_rate=1.2e-4, steps=300_000, machines=MACHINES)

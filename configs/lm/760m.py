"""CM3Leon 760m, pre-training (arXiv 2309.02591, table 3: 256 GPUs, 1.9T tokens).

    cm3 train --config=configs/lm/760m.py --workdir=runs/760m --config.lm.train="[...]"
    cm3 aot --config=configs/lm/760m.py --topology=v5p:8x8x8

The rule of the devices at hand decides mesh, microbatches and recomputation. Those of TPUs are guesses that `cm3 aot`
can check; those of GPUs follow measurements on one H100 (docs/training.md). Paths of the records and tokenizers are
given on the command line or in a copy of this file.
"""

from ml_collections import ConfigDict

from cm3jax.machines import MachineRule
from cm3jax.models.config import PRESETS
from cm3jax.parallel.mesh import MeshConfig
from cm3jax.recipes import cm3leon_pretraining, gpu_rule

GROUPS = MeshConfig(data=-1, fsdp=16)
# More chips than sequences: two share one.
PAIRS = MeshConfig(data=-1, fsdp=16, tensor=2)

MACHINES = (
    MachineRule("v4", GROUPS, devices=16, microbatch=1, remat="none"),
    MachineRule("v5e", GROUPS, devices=16, microbatch=1, remat="dots"),
    MachineRule("v5p", GROUPS, devices=16, microbatch=2, remat="none"),
    MachineRule("v5p", PAIRS, devices=4096, microbatch=1, remat="none"),
    MachineRule("v6e", GROUPS, devices=16, microbatch=1, remat="none"),
    gpu_rule("h100", microbatch=8),
    gpu_rule("h200", microbatch=16),
)


def get_config() -> ConfigDict:
    return cm3leon_pretraining(PRESETS["cm3leon-760m"], learning_rate=5e-4, steps=237_500, machines=MACHINES)

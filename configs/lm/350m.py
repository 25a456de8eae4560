"""CM3Leon 350m, pre-training (arXiv 2309.02591, table 3: 256 GPUs, 1.4T tokens).

    cm3 train --config=configs/lm/350m.py --workdir=runs/350m --config.lm.train="[...]"
    cm3 aot --config=configs/lm/350m.py --topology=v5p:8x8x8

The rule of the devices at hand decides mesh, microbatches and recomputation (docs/aot.md has what was predicted for
each). Paths of the records and tokenizers are given on the command line or in a copy of this file.
"""

from ml_collections import ConfigDict

from cm3jax.machines import MachineRule
from cm3jax.models.config import PRESETS
from cm3jax.parallel.mesh import MeshConfig
from cm3jax.recipes import cm3leon_pretraining

SHARDED = MeshConfig(data=1, fsdp=-1)

MACHINES = (
    MachineRule("v4", SHARDED, microbatch=4, remat="full"),
    MachineRule("v5e", SHARDED, microbatch=2, remat="full"),
    MachineRule("v5p", SHARDED, microbatch=4, remat="full"),
    MachineRule("v6e", SHARDED, microbatch=2, remat="full"),
    MachineRule("h100", SHARDED, microbatch=4, remat="full", flags="gpu"),
    MachineRule("h200", SHARDED, microbatch=4, remat="full", flags="gpu"),
)


def get_config() -> ConfigDict:
    return cm3leon_pretraining(PRESETS["cm3leon-350m"], learning_rate=6e-4, steps=175_000, machines=MACHINES)

"""Settings of published runs, for the experiment files of configs/."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from cm3jax.config import to_dict
from cm3jax.machines import MachineRule
from cm3jax.models.config import TransformerConfig
from cm3jax.parallel.mesh import MeshConfig


def gpu_rule(chip: str, microbatch: int, devices: int = 1) -> MachineRule:
    """Of NVIDIA GPUs with 80 GB or more: everything sharded over all, no loop over the layers (docs/training.md)."""
    return MachineRule(
        chip,
        MeshConfig(data=1, fsdp=-1),
        microbatch=microbatch,
        remat="dots",
        devices=devices,
        scan_layers=False,
        loss_tokens=8192,
        flags="gpu",
    )


def cm3leon_pretraining(
    model: TransformerConfig, learning_rate: float, steps: int, machines: Sequence[MachineRule]
) -> ConfigDict:
    """Pre-training as in CM3Leon's paper (arXiv 2309.02591, table 3 and section 3).

    Sequences of 4096 tokens, 8M tokens (2^23) an update, 1500 updates of warm-up. Betas, decay and schedule are
    unstated there; the defaults of `OptimConfig` are OPT's.

    Args:
      learning_rate: the peak.
      machines: rules for the devices that the file knows.
    """
    values: dict[str, Any] = {
        "task": "lm",
        "machines": tuple(to_dict(rule) for rule in machines),
        "run": {
            "steps": steps,
            "log_every": 10,
            "eval_every": 5000,
            "mesh": {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1},
            "checkpoint": {"every": 1000, "keep": 3, "keep_every": 25_000},
        },
        "lm": {
            "model": dataclasses.asdict(model) | {"dtype": "bfloat16"},
            "train": ({"path": "records/train"},),
            "valid": ({"path": "records/valid"},),
            "image_tokenizer": "runs/vqgan",
            "text_tokenizer": "text.model",
            "plan": {"length": 4096, "packing": "cut", "spans": "paper"},
            "cm3": {"whole_segment": 0.5},
            "batch_size": 2048,
            "accumulate": 1,
            "loss_chunk": 8192,
            "optim": {"learning_rate": learning_rate, "warmup_steps": 1500},
        },
    }
    return ConfigDict(values)
